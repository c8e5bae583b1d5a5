"""Values from the command line: `--a.b 2`, `--a.b=2`, `--flag`, `--no-flag`."""

import re
from typing import Any, get_origin

from llmtrain.config import fields
from llmtrain.config.errors import ConfigError
from llmtrain.config.layer import Key, Layer, Path, dotted, over, whole
from llmtrain.config.shortforms import FORMS
from llmtrain.config.yamlfile import scalar

ALIASES = {"resume": "checkpoint.resume"}
COMMAND_LINE = "command line"


def parse(words: list[str]) -> list[tuple[Path, Any]]:
    """The (path, value) pairs that `words` give, in order.

    Raises:
        ConfigError: a word that is no option, or an option without a value that is not a switch.
    """
    pairs, index = [], 0
    while index < len(words):
        word = words[index]
        if not re.match(r"--[A-Za-z]", word):
            raise ConfigError(f"{word!r} on the command line is no option; write --section.key VALUE or --section.key=VALUE")
        name, equals, text = word[2:].partition("=")
        following = words[index + 1] if index + 1 < len(words) else None
        if equals:
            pairs.append(_pair(name, text))
        elif name.startswith("no-"):
            pairs.append(_switch(name[3:], False))
        elif following is not None and not following.startswith("--"):
            pairs.append(_pair(name, following))
            index += 1
        else:
            pairs.append(_switch(name, True))
        index += 1
    return pairs


def _path(name: str) -> Path:
    parts = ALIASES.get(name, name).split(".")
    if not all(parts):
        raise ConfigError(f"--{name} on the command line is no dotted name; write --section.key")
    return tuple(int(part) if part.isdigit() else part for part in parts)


def _pair(name: str, text: str) -> tuple[Path, Any]:
    path = _path(name)
    if fields.is_text(path) and text not in ("null", "~"):
        return path, text
    return path, scalar(text)


def _switch(name: str, value: bool) -> tuple[Path, bool]:
    path = _path(name)
    if fields.types_at(path) and not fields.is_flag(path):
        prefix = "" if value else "no-"
        allowed = fields.allowed(fields.types_at(path)[0])
        raise ConfigError(f"--{prefix}{name} on the command line is no switch, it needs a value: {allowed}")
    return path, value


def apply(layer: Layer, pairs: list[tuple[Path, Any]]) -> Layer:
    """`layer` with the command line's values in it; a mapping merges, an index one past a list's end appends."""
    for given, value in pairs:
        path = _names(given)
        value = FORMS.get(path, lambda as_is: as_is)(value)
        if isinstance(value, dict) and all(isinstance(key, str) for key in path):
            layer = over(layer, _nested(path, value))
            continue
        for end in range(1, len(path)):
            _open(layer, path[:end], path[end])
        _index_fits(layer.get(path[:-1]), path[:-1], path[-1])
        layer.put(path, value, COMMAND_LINE)
    return layer


def _names(path: Path) -> Path:
    """`path` with the numbers that are names of a mapping, not places in a list, as text."""
    fixed: Path = ()
    for key in path:
        mapping = any(get_origin(fields.bare(m)) is dict for t in fields.types_at(fixed) for m in fields.members(t))
        fixed = (*fixed, str(key) if mapping else key)
    return fixed


def _nested(path: Path, value: Any) -> Layer:
    for key in reversed(path):
        value = {key: value}
    return whole(value, COMMAND_LINE)


def _open(layer: Layer, path: Path, following: Key) -> None:
    """Make sure that `path` holds a container which `following` may index."""
    parent = layer.get(path[:-1])
    _index_fits(parent, path[:-1], path[-1])
    missing = path[-1] not in parent if isinstance(parent, dict) else path[-1] == len(parent)
    if missing or parent[path[-1]] is None:
        default = fields.default_at(path)
        empty = list(default) if isinstance(default, list | tuple) else [] if isinstance(following, int) else {}
        layer.put(path, empty, "default" if empty else COMMAND_LINE)


def _index_fits(parent: Any, path: Path, key: Key) -> None:
    if isinstance(parent, dict) and isinstance(key, str):
        return
    if isinstance(parent, dict) and not fields.types_at((*path, key)):
        raise ConfigError(f"--{dotted((*path, key))} on the command line: {dotted(path)} is no list and has no entry {key}")
    if isinstance(parent, list) and not isinstance(key, int):
        raise ConfigError(
            f"--{dotted((*path, key))} on the command line: {dotted(path)} is a list; give the number of an entry before {key!r}"
        )
    if isinstance(parent, list) and key > len(parent):
        raise ConfigError(f"--{dotted((*path, key))} on the command line: {dotted(path)} has {len(parent)} entries, counted from 0")
    if not isinstance(parent, dict | list):
        raise ConfigError(f"--{dotted((*path, key))} on the command line: {dotted(path)} is {parent!r}, which has no entries")
