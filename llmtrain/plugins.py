"""Code from elsewhere that registers model families, ops, stages or data sets."""

import importlib
from importlib.metadata import EntryPoint, entry_points

from llmtrain.errors import UserError

GROUP = "llmtrain.plugins"


def load_plugins(names: list[str]) -> list[str]:
    """Load every installed entry point of the group `llmtrain.plugins`, then import the modules `names`; returns what was loaded.

    An entry point that names a function is called, one that names a module is imported. A name in `names` may also be that of an
    entry point; nothing is loaded twice, as Python keeps modules.

    Raises:
        UserError: a plugin does not import, with the option and the cause.
    """
    installed = {point.name: point for point in entry_points(group=GROUP)}
    for point in installed.values():
        _start(point)
    for name in names:
        if name not in installed:
            _import(name)
    return [*installed, *(name for name in names if name not in installed)]


def _start(point: EntryPoint) -> None:
    package = point.dist.name if point.dist else "an unknown package"
    try:
        loaded = point.load()
    except Exception as error:
        raise UserError(
            f"plugin {point.name!r} ({point.value}) of {package} does not load: {_cause(error)}; repair or uninstall it"
        ) from error
    if callable(loaded):
        loaded()


def _import(name: str) -> None:
    try:
        importlib.import_module(name)
    except Exception as error:
        raise UserError(f"plugins: {name!r} cannot be imported: {_cause(error)}; allowed: a module on the Python path") from error


def _cause(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
