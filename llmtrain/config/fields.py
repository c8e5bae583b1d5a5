"""What the configuration's classes say about a dotted path: its type, default, documentation, and its neighbours."""

import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from llmtrain.config.base import Section
from llmtrain.config.layer import Path, dotted

BOUNDS = {
    annotated_types.Gt: ("gt", ">"),
    annotated_types.Ge: ("ge", ">="),
    annotated_types.Lt: ("lt", "<"),
    annotated_types.Le: ("le", "<="),
}
WORDS = {int: "an integer", float: "a number", bool: "true or false", str: "text", type(None): "null", Any: "anything"}


@dataclass(frozen=True)
class Field:
    """One documented option."""

    path: Path
    annotation: Any
    default: Any
    doc: str


def root() -> type[Section]:
    """The class of a whole run, with what plugins have added to it."""
    from llmtrain.config.extend import extended
    from llmtrain.config.run import RunConfig

    return extended(RunConfig)


def members(annotation: Any) -> list[Any]:
    """The alternatives of a union, without `Annotated` around unions; a plain type is its own only member."""
    if get_origin(annotation) is Annotated:
        inner = get_args(annotation)[0]
        return members(inner) if get_origin(inner) in (Union, types.UnionType) else [annotation]
    if get_origin(annotation) in (Union, types.UnionType):
        return [m for a in get_args(annotation) for m in members(a)]
    return [annotation]


def bare(annotation: Any) -> Any:
    """The type inside `Annotated`."""
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def sections(annotation: Any) -> list[type[Section]]:
    """The sections that a value of this type may be."""
    return [b for m in members(annotation) if isinstance(b := bare(m), type) and issubclass(b, Section)]


def typed(info: FieldInfo) -> Any:
    """The field's type with its bounds (pydantic keeps those of a plain type aside)."""
    return Annotated[(info.annotation, *info.metadata)] if info.metadata else info.annotation


def inside(annotation: Any, key: Any) -> list[Any]:
    """Types that the value under `key` may have in a value of type `annotation`; empty if there is no such key."""
    found = []
    for member in map(bare, members(annotation)):
        kind, args = get_origin(member), get_args(member)
        if isinstance(member, type) and issubclass(member, Section) and key in member.model_fields:
            found.append(typed(member.model_fields[key]))
        elif isinstance(key, int) and kind is list:
            found.append(args[0])
        elif isinstance(key, int) and kind is tuple and key < len(args):
            found.append(args[key])
        elif kind is dict:
            found.append(args[1])
    return found


def types_at(path: Path) -> list[Any]:
    """Types that the value at `path` may have; empty if there is no such option."""
    current: list[Any] = [root()]
    for key in path:
        current = [t for annotation in current for t in inside(annotation, key)]
    return current


def is_union(path: Path) -> bool:
    """Whether `kind` chooses between sections at `path`."""
    return len({s for t in types_at(path) for s in sections(t)}) > 1


def is_text(path: Path) -> bool:
    """Whether the value at `path` is always text (or null), so that a word on the command line needs no quotes."""
    alternatives = {bare(m) for t in types_at(path) for m in members(t)}
    return bool(alternatives) and alternatives <= {str, type(None)}


def is_flag(path: Path) -> bool:
    """Whether the value at `path` is true or false."""
    return [bare(m) for t in types_at(path) for m in members(t)] == [bool]


def default_at(path: Path) -> Any:
    """The default of the value at `path`; None where there is none."""
    value: Any = root()()
    for key in path:
        try:
            value = getattr(value, key) if isinstance(value, Section) else value[key]
        except (AttributeError, KeyError, IndexError, TypeError):
            return None
    return value


def walk(section: type[Section] | None = None, path: Path = ()) -> Iterator[Field]:
    """Every option below `section`, depth first; the entries of a list of sections stand under `N`."""
    for name, info in (section or root()).model_fields.items():
        here, annotation = (*path, name), typed(info)
        default = None if info.default is PydanticUndefined else info.default
        inner = sections(annotation)
        yield Field(here, annotation, default, info.description or "")
        for one in inner:
            yield from walk(one, here)
        for member in map(bare, members(annotation)):
            if get_origin(member) is list:
                for one in sections(get_args(member)[0]):
                    yield from walk(one, (*here, "N"))


def children(path: Path) -> list[str]:
    """Names of the options directly below `path`."""
    return sorted({name for t in types_at(path) for s in sections(t) for name in s.model_fields}) if path else list(root().model_fields)


def allowed(annotation: Any, *, brief: bool = False) -> str:
    """In words, the values that a type takes; `brief` does not list the keys of sections."""
    return " or ".join(dict.fromkeys(_one(m, brief) for m in members(annotation)))


def _one(member: Any, brief: bool) -> str:
    plain = bare(member)
    kind, args = get_origin(plain), get_args(plain)
    if kind is Literal:
        return "one of " + ", ".join(map(str, args)) if len(args) > 1 else str(args[0])
    if kind is list:
        return "a list of sections" if brief and sections(args[0]) else f"a list, each entry {allowed(args[0], brief=brief)}"
    if kind is tuple:
        return f"a list of {len(args)}, each {allowed(args[0], brief=brief)}"
    if kind is dict:
        return f"a mapping, each value {allowed(args[1], brief=brief)}"
    if isinstance(plain, type) and issubclass(plain, Section):
        return "a section" if brief else f"a section with {', '.join(plain.model_fields)}"
    return WORDS.get(plain, str(plain)) + _bounds(member)


def _bounds(member: Any) -> str:
    words = []
    for extra in get_args(member)[1:] if get_origin(member) is Annotated else ():
        constraints = getattr(extra, "metadata", None) or [extra]
        words += [f"{sign} {getattr(c, name)}" for c in constraints for kind, (name, sign) in BOUNDS.items() if isinstance(c, kind)]
    return " " + " and ".join(words) if words else ""


def find(name: str) -> list[str]:
    """Dotted paths of all options called `name`."""
    return list(dict.fromkeys(dotted(f.path) for f in walk() if f.path[-1] == name))


def literal_values(annotation: Any) -> list[str]:
    """The words that a choice offers."""
    return [str(v) for m in map(bare, members(annotation)) if get_origin(m) is Literal for v in get_args(m)]


def literals(section: type[Section], name: str) -> list[str]:
    """The words that the field `name` of `section` offers."""
    return literal_values(section.model_fields[name].annotation)
