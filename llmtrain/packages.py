"""Installed packages, found without importing them."""

import importlib.metadata as metadata
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path


def needs(module: str, package: str) -> Callable[[], str | None]:
    """A probe for an entry of the op registry: why `import module` would fail, or None."""
    return lambda: None if importlib.util.find_spec(module) else f"needs the package {package}: pip install {package}"


def places(module: str, path: Sequence[str]) -> list[ModuleSpec]:
    """Every place from which `import module` could be served, first the one that is; folders without code count if they are first."""
    specs = [PathFinder.find_spec(module, [entry or "."]) for entry in dict.fromkeys(path)]
    return [spec for spec in specs if spec is not None]


def wrong_apex(path: Sequence[str] | None = None) -> str | None:
    """What is wrong with the installed package `apex` where it is not NVIDIA's, which the package index does not have, or None."""
    path = sys.path if path is None else path
    installed = next(iter(metadata.distributions(name="apex", path=[entry or "." for entry in path])), None)
    homes = [Path(folder) for spec in places("apex", path) for folder in spec.submodule_search_locations or []]
    if installed is None or any((home / part).exists() for home in homes for part in ("amp", "optimizers", "normalization")):
        return None
    return f"this apex is not NVIDIA's: apex {installed.version} of the package index is a web toolkit"


def installed_version(package: str) -> str | None:
    """The version of an installed package; None if it is not there."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
