"""Pydantic's errors in the words of the configuration: which option, which value, what is allowed, where it came from."""

import difflib
import re
from collections.abc import Iterator
from typing import Any

from pydantic import ValidationError

from llmtrain.config import fields
from llmtrain.config.base import Section
from llmtrain.config.errors import ConfigError
from llmtrain.config.layer import Key, Layer, Path, dotted


def explain(error: ValidationError, layer: Layer) -> ConfigError:
    """One `ConfigError` that holds a message per option that is wrong."""
    problems: dict[tuple[Path, str], str] = {}
    for item in error.errors():
        path = _real(item["loc"], layer.data)
        about = "" if item["type"] not in ("value_error", "extra_forbidden") else item["msg"]
        problems.setdefault((path, about), _message(item, path, layer))
    return ConfigError(*problems.values())


def _real(loc: tuple[Key, ...], data: Any) -> Path:
    """The option's path: pydantic's location without the names of union members in it."""
    path: tuple[Key, ...] = ()
    for index, key in enumerate(loc):
        given = (isinstance(data, dict) and key in data) or (isinstance(data, list) and isinstance(key, int) and key < len(data))
        if given:
            path, data = (*path, key), data[key]
        elif index == len(loc) - 1 and fields.types_at((*path, key)):
            path = (*path, key)
    return path


def _message(item: dict[str, Any], path: Path, layer: Layer) -> str:
    came = f" ({layer.where(path)})" if path and layer.where(path) else ""
    if item["type"] == "extra_forbidden":
        return f"{dotted(path)}: no such option{came}{suggest(path)}"
    if item["type"] == "value_error":
        return f"{dotted(path) or 'the configuration'}: {_own_words(item)}{_sources(item['msg'], path, layer)}"
    choices = fields.types_at(path)
    allowed = " or ".join(dict.fromkeys(map(fields.allowed, choices)))
    if item["type"] == "missing":
        return f"{dotted(path)}: must be given, {allowed}{came}"
    if item["type"].startswith("union_tag"):
        return _kind(item["input"], path, layer, [section for choice in choices for section in fields.sections(choice)])
    return f"{dotted(path)}: {_shown(item['input'])} is not allowed{came}; allowed: {allowed}{_closest(item['input'], choices)}"


def _kind(value: Any, path: Path, layer: Layer, sections: list[type[Section]]) -> str:
    """Of a section that `kind` chooses, whose kind is missing or not one of `sections`."""
    given = value if not isinstance(value, dict) else value.get("kind")
    kinds = [kind for section in sections for kind in fields.literals(section, "kind")]
    name, came = dotted((*path, "kind")), f" ({layer.where((*path, 'kind')) or layer.where(path)})"
    if given is not None:
        return f"{name}: {given!r} is not allowed{came}; allowed: one of {', '.join(kinds)}{_near(str(given), kinds)}"
    having = [kind for section in sections if set(value) <= set(section.model_fields) for kind in fields.literals(section, "kind")]
    whose = f"; with {', '.join(dotted((*path, key)) for key in value)}: {', '.join(having)}" if value and having else ""
    return f"{name}: must be given, one of {', '.join(kinds)}{came}{whose}"


def _own_words(item: dict[str, Any]) -> str:
    cause = item.get("ctx", {}).get("error")
    return str(cause) if cause else item["msg"].removeprefix("Value error, ")


def _shown(value: Any) -> str:
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _sources(message: str, path: Path, layer: Layer) -> str:
    """Where the options that a section's own check speaks of came from."""
    found = {}
    for word in re.findall(r"[a-z_]+(?:\.[a-z_0-9]+)*", message):
        for candidate in (_keys(word), (*path, *_keys(word))):
            if candidate in layer.origin and fields.types_at(candidate):
                found[dotted(candidate)] = layer.origin[candidate]
    return f" ({'; '.join(f'{name} from {origin}' for name, origin in found.items())})" if found else ""


def _keys(word: str) -> Path:
    return tuple(int(part) if part.isdigit() else part for part in word.split("."))


def suggest(path: Path) -> str:
    """What an unknown option may have meant: a sibling with a similar name, or the same name elsewhere."""
    name, parent = str(path[-1]), path[:-1]
    siblings = fields.children(parent)
    elsewhere = [p for p in fields.find(name) if p != dotted(path)]
    near = difflib.get_close_matches(name, siblings, 1, 0.7)
    if near:
        return f"; did you mean {dotted((*parent, near[0]))}?"
    if elsewhere:
        return f"; `{name}` lives at {' and '.join(elsewhere[:3])}"
    return _anywhere(name) or f"; options here: {', '.join(siblings)}"


def _anywhere(name: str) -> str:
    names: dict[str, str] = {}
    for field in fields.walk():
        names.setdefault(str(field.path[-1]), dotted(field.path))
    near = difflib.get_close_matches(name, list(names), 1, 0.7)
    return f"; did you mean {names[near[0]]}?" if near else ""


def _closest(value: Any, choices: list[Any]) -> str:
    return _near(value, list(_literals(choices))) if isinstance(value, str) else ""


def _near(value: str, options: list[str]) -> str:
    near = difflib.get_close_matches(value, options, 1, 0.6)
    return f"; did you mean {near[0]}?" if near else ""


def _literals(choices: list[Any]) -> Iterator[str]:
    for choice in choices:
        yield from fields.literal_values(choice)
