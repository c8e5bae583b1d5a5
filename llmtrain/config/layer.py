"""Plain configuration values that remember where each came from, and how one layer of them is laid over another."""

import copy
from dataclasses import dataclass
from typing import Any

Key = str | int
Path = tuple[Key, ...]


def dotted(path: Path) -> str:
    """`("train", "phases", 0)` as `train.phases.0`."""
    return ".".join(map(str, path))


@dataclass
class Layer:
    """Nested dicts and lists as YAML gives them, and the origin of every value in them by path."""

    data: dict[str, Any]
    origin: dict[Path, str]

    def where(self, path: Path) -> str | None:
        """Origin of the value at `path`, or of the nearest value around it."""
        for end in range(len(path), 0, -1):
            if path[:end] in self.origin:
                return self.origin[path[:end]]
        return None

    def put(self, path: Path, value: Any, origin: str) -> None:
        """Set the value at `path`, whose parent exists; every value inside takes the same origin."""
        parent = self.get(path[:-1])
        if isinstance(parent, list) and path[-1] == len(parent):
            parent.append(value)
        else:
            parent[path[-1]] = value
        self._forget(path)
        self._mark(path, value, origin)

    def get(self, path: Path) -> Any:
        """The value at `path`; KeyError or IndexError if there is none."""
        value: Any = self.data
        for key in path:
            value = value[key]
        return value

    def _mark(self, path: Path, value: Any, origin: str) -> None:
        self.origin[path] = origin
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, item in items:
            self._mark((*path, key), item, origin)

    def _forget(self, path: Path) -> None:
        for known in [p for p in self.origin if p[: len(path)] == path]:
            del self.origin[known]


def whole(data: dict[str, Any], origin: str) -> Layer:
    """A layer whose values all have one origin."""
    layer = Layer({}, {})
    for key, value in data.items():
        layer.put((key,), copy.deepcopy(value), origin)
    return layer


def over(base: Layer, top: Layer) -> Layer:
    """`top` laid over `base`: mappings merge key by key, anything else is replaced, lists as a whole.

    Where a union is told apart by `kind`, another kind starts afresh: the keys of the old one would mean nothing to it.
    """
    result = Layer(copy.deepcopy(base.data), dict(base.origin))
    _lay(result, top, (), top.data)
    return result


def _lay(result: Layer, top: Layer, path: Path, values: dict[str, Any]) -> None:
    from llmtrain.config.fields import default_at, is_union

    for key, value in values.items():
        here = (*path, key)
        old = result.get(path).get(key)
        merges = isinstance(value, dict) and isinstance(old, dict)
        if merges and "kind" in value and is_union(here):
            merges = value["kind"] == old.get("kind", getattr(default_at(here), "kind", value["kind"]))
        if merges:
            result.origin.setdefault(here, top.origin.get(here, ""))
            _lay(result, top, here, value)
            continue
        result.put(here, copy.deepcopy(value), top.where(here) or "")
        result.origin.update({p: o for p, o in top.origin.items() if p[: len(here)] == here})
