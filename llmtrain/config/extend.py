"""Sections and kinds that plugins add to the configuration, so that what they read is checked and documented like everything else."""

from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import Field, create_model
from pydantic.fields import FieldInfo

from llmtrain.config import fields
from llmtrain.config.base import Section
from llmtrain.config.layer import Path

_SECTIONS: dict[Path, type[Section]] = {}
_KINDS: dict[Path, list[type[Section]]] = {}
_BUILT: dict[Path, type[Section]] = {}


def register_section(path: str, section: type[Section]) -> type[Section]:
    """Add the section `path` to every run's configuration: `distill` at the top, `model.mixer` inside the model.

    The first line of the class's docstring is its documentation; all its fields need defaults.

    Raises:
        ValueError: `path` is taken, its parent is no section, or a field has no default.
    """
    keys = tuple(path.split("."))
    known = _SECTIONS.get(keys)
    if known is not section:
        parents = [s for t in fields.types_at(keys[:-1]) for s in fields.sections(t)] if keys[:-1] else [fields.root()]
        if len(parents) != 1:
            raise ValueError(f"configuration section {path!r}: {'.'.join(keys[:-1])} is no single section of a run")
        if known is not None or keys[-1] in parents[0].model_fields:
            raise ValueError(f"configuration section {path!r} is there already; choose another name")
        needed = [name for name, info in section.model_fields.items() if info.is_required()]
        if needed:
            raise ValueError(f"configuration section {path!r}: {section.__name__}.{needed[0]} needs a default")
        _SECTIONS[keys] = section
        _BUILT.clear()
    return section


def register_kind(path: str, section: type[Section]) -> type[Section]:
    """Add an alternative to an option that `kind` chooses: `data.train`, `engine`, `model.position.scaling`.

    `section` has a field `kind: Literal[NAME] = NAME`.

    Raises:
        ValueError: no such option, or it has that kind already.
    """
    keys = tuple(path.split("."))
    if section not in _KINDS.get(keys, []):
        [name] = fields.literals(section, "kind")
        there = [s for t in _entries(keys) for s in fields.sections(t) if "kind" in s.model_fields]
        if not there:
            raise ValueError(f"configuration: `kind` chooses nothing at {path!r}")
        if any(name in fields.literals(s, "kind") for s in there):
            raise ValueError(f"configuration: {path} has a kind {name!r} already; choose another name")
        _KINDS.setdefault(keys, []).append(section)
        _BUILT.clear()
    return section


def unregister(section: type[Section]) -> None:
    """Take back what `register_section` or `register_kind` added."""
    for path in [p for p, known in _SECTIONS.items() if known is section]:
        del _SECTIONS[path]
    for known in _KINDS.values():
        known[:] = [other for other in known if other is not section]
    _BUILT.clear()


def _entries(path: Path) -> list[Any]:
    """Types of the option at `path`, of a list those of its entries."""
    found = [fields.bare(m) for t in fields.types_at(path) for m in fields.members(t)]
    return [get_args(t)[0] if get_origin(t) is list else t for t in found]


def extended(section: type[Section], path: Path = ()) -> type[Section]:
    """`section`, which stands at `path`, with all that was registered below it; the class itself where nothing was."""
    if not any(added[: len(path)] == path for added in (*_SECTIONS, *(p for p, kinds in _KINDS.items() if kinds))):
        return section
    if path not in _BUILT:
        changed = {name: new for name, info in section.model_fields.items() if (new := _field(info, (*path, name))) is not None}
        for added, kind in _SECTIONS.items():
            if added[:-1] == path:
                doc = (kind.__doc__ or "").strip().split("\n")[0]
                inner = extended(kind, added)
                changed[added[-1]] = (inner, Field(default=inner(), description=doc))
        built = create_model(section.__name__, __base__=section, __module__=section.__module__, **changed) if changed else section
        built.__doc__ = section.__doc__
        _BUILT[path] = built
    return _BUILT[path]


def _field(info: FieldInfo, path: Path) -> tuple[Any, Any] | None:
    """Type and default of a field below which something was registered; None for others."""
    kinds, annotation = _KINDS.get(path), info.annotation
    if kinds and get_origin(annotation) is list:
        return list[_union(get_args(annotation)[0], kinds)], info
    if kinds:
        return _union(annotation, kinds), info
    inner = extended(annotation, path) if isinstance(annotation, type) and issubclass(annotation, Section) else annotation
    return None if inner is annotation else (inner, Field(default=inner(), description=info.description))


def _union(annotation: Any, kinds: list[type[Section]]) -> Any:
    members = [m for m in fields.members(annotation) if m is not type(None)]
    known = [s for m in members for s in fields.sections(m)]
    union = Annotated[Union[(*known, *kinds)], Field(discriminator="kind")]
    return union | None if type(None) in fields.members(annotation) else union


def without_unused(values: dict[str, Any]) -> dict[str, Any]:
    """The plain `values` of a run without added sections at their defaults, so that reading them back needs only the plugins used."""
    for path, section in _SECTIONS.items():
        inside: Any = values
        for key in path[:-1]:
            inside = inside.get(key, {})
        if inside.get(path[-1]) == extended(section, path)().model_dump(mode="json"):
            del inside[path[-1]]
    return values
