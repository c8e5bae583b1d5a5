"""YAML with line numbers: read into plain values plus where each came from, and written back.

Scalars follow YAML 1.2's core rules rather than PyYAML's 1.1: `1e-4` is a number, `off` and `no` are words, a date is text.
"""

import re
from pathlib import Path
from typing import Any

import yaml

from llmtrain.config.errors import ConfigError
from llmtrain.config.layer import Key, Layer

BOOL, INT, FLOAT, NULL = (f"tag:yaml.org,2002:{name}" for name in ("bool", "int", "float", "null"))
RESOLVERS = [
    (BOOL, r"true|True|TRUE|false|False|FALSE", "tTfF"),
    (INT, r"[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F_]+)", "-+0123456789"),
    (
        FLOAT,
        r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|\.[0-9_]+(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+|\.(?:inf|Inf|INF))|\.(?:nan|NaN|NAN)",
        "-+0123456789.",
    ),
    (NULL, r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:merge", r"<<", "<"),
]


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict = {}


class _Dumper(yaml.SafeDumper):
    """Quotes text that either YAML 1.1 or our reader would take for something else."""


for _tag, _pattern, _first in RESOLVERS:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_tag, re.compile(f"^(?:{_pattern})$"), list(_first))


def scalar(text: str) -> Any:
    """The value that `text` has as YAML; text that is no YAML stays text."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError:
        return text


def dump(value: Any) -> str:
    """`value` as block YAML that `read` gives back unchanged."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=False, width=130)


def inline(value: Any) -> str:
    """`value` as YAML on one line."""
    text = yaml.dump(value, Dumper=_Dumper, default_flow_style=True, allow_unicode=True, sort_keys=False, width=1 << 20)
    return text.removesuffix("...\n").strip()


def read(path: Path, shown: str) -> Layer:
    """The mapping in the YAML file `path`, each value with its line.

    Args:
        path: the file.
        shown: how messages call the file.

    Raises:
        ConfigError: not readable, not YAML, no mapping, or a key given twice.
    """
    try:
        loader = _Loader(path.read_text(encoding="utf-8"))
        node = loader.get_single_node()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{shown}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{shown}{_line(error)}: not valid YAML: {getattr(error, 'problem', None) or error}") from error
    if node is None:
        return Layer({}, {})
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"{shown}:{node.start_mark.line + 1}: a configuration is a mapping of sections, this is a {node.id}")
    walk = _Walk(loader, shown)
    return Layer(walk.value(node, ()), walk.origin)


def _line(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    return f":{mark.line + 1}" if mark else ""


class _Walk:
    """Turns nodes into values while noting the line of each."""

    def __init__(self, loader: _Loader, shown: str):
        self.loader, self.shown = loader, shown
        self.origin: dict[tuple[Key, ...], str] = {}
        self.open: set[int] = set()

    def value(self, node: yaml.Node, path: tuple[Key, ...]) -> Any:
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node)
        if id(node) in self.open:
            raise ConfigError(f"{self._at(node)}: {'.'.join(map(str, path))} contains itself through an alias")
        self.open.add(id(node))
        result = self._mapping(node, path) if isinstance(node, yaml.MappingNode) else self._sequence(node, path)
        self.open.discard(id(node))
        return result

    def _at(self, node: yaml.Node) -> str:
        return f"{self.shown}:{node.start_mark.line + 1}"

    def _scalar(self, node: yaml.ScalarNode) -> Any:
        try:
            return self.loader.construct_object(node)
        except (yaml.YAMLError, ValueError) as error:
            raise ConfigError(f"{self._at(node)}: {node.value!r} is not valid here: {getattr(error, 'problem', None) or error}") from error

    def _sequence(self, node: yaml.SequenceNode, path: tuple[Key, ...]) -> list[Any]:
        values = []
        for index, item in enumerate(node.value):
            self.origin[(*path, index)] = self._at(item)
            values.append(self.value(item, (*path, index)))
        return values

    def _mapping(self, node: yaml.MappingNode, path: tuple[Key, ...]) -> dict[str, Any]:
        self._no_duplicates(node, path)
        self.loader.flatten_mapping(node)
        values: dict[str, Any] = {}
        for key, item in node.value:
            here = (*path, str(key.value))
            self.origin[here] = self._at(key)
            values[here[-1]] = self.value(item, here)
        return values

    def _no_duplicates(self, node: yaml.MappingNode, path: tuple[Key, ...]) -> None:
        lines: dict[str, str] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise ConfigError(f"{self._at(key)}: a key must be a word, not a {key.id}")
            if key.value in lines and key.value != "<<":
                dotted = ".".join(map(str, (*path, key.value)))
                raise ConfigError(f"{self._at(key)}: {dotted} is given twice, first at {lines[key.value]}; keep one")
            lines[key.value] = self._at(key)
