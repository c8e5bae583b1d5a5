"""Code from elsewhere that registers model families, ops, stages or data sources. Reading a configuration loads it."""

import importlib
import os
import sys
from importlib.metadata import EntryPoint, entry_points

from llmtrain.errors import UserError

GROUP = "llmtrain.plugins"
_STARTED: set[str] = set()


def load_plugins(names: list[str]) -> list[str]:
    """Load every installed entry point of the group `llmtrain.plugins`, then import the modules `names`; returns what is new.

    An entry point that names a function is called, one that names a module is imported. A name in `names` may also be that of an
    entry point. Nothing is loaded twice. Modules in the working folder are found, as with `python -m`.

    Raises:
        UserError: a plugin does not import, with the option and the cause.
    """
    installed = {point.name: point for point in entry_points(group=GROUP)}
    new = [point.name for point in installed.values() if _once(f"{point.name} = {point.value}", lambda point=point: _start(point))]
    return new + [name for name in names if name not in installed and _once(name, lambda name=name: _import(name))]


def _once(key: str, start) -> bool:
    if key in _STARTED:
        return False
    start()
    _STARTED.add(key)
    return True


def _start(point: EntryPoint) -> None:
    package = point.dist.name if point.dist else "an unknown package"
    try:
        loaded = point.load()
        if callable(loaded):
            loaded()
    except Exception as error:
        raise UserError(
            f"plugin {point.name!r} ({point.value}) of {package} does not load: {_cause(error)}; repair or uninstall it"
        ) from error


def _import(name: str) -> None:
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())
    try:
        importlib.import_module(name)
    except Exception as error:
        raise UserError(f"plugins: {name!r} cannot be imported: {_cause(error)}; allowed: a module on the Python path") from error


def _cause(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
