"""Short forms written out, so that layers merge: `precision: bf16` becomes `precision: {compute: bf16}`."""

from typing import Any

from llmtrain.config.layer import Layer, Path

PRECISION_PARTS = ("compute", "params", "reduce", "accumulate", "optimizer")


def precision(value: Any) -> Any:
    """A dtype's name stands for the compute dtype; `fp64` for all of them."""
    if value == "fp64":
        return dict.fromkeys(PRECISION_PARTS, "fp64")
    return {"compute": value} if isinstance(value, str) else value


def engine(value: Any) -> Any:
    """An engine's name stands for its kind."""
    return {"kind": value} if isinstance(value, str) else value


def model(value: Any) -> Any:
    """A name stands for the preset."""
    return {"preset": value} if isinstance(value, str) else value


def sources(value: Any) -> Any:
    """A path stands for one source, and in a list for a source each."""
    if isinstance(value, str):
        value = [value]
    return [{"path": item} if isinstance(item, str) else item for item in value] if isinstance(value, list) else value


FORMS = {("precision",): precision, ("engine",): engine, ("model",): model, ("data", "train"): sources, ("data", "validation"): sources}


def expand_short_forms(layer: Layer) -> Layer:
    """`layer` with every short form written out; origins stay."""
    for path, form in FORMS.items():
        parent = _parent(layer, path)
        if parent is None or path[-1] not in parent:
            continue
        old = parent[path[-1]]
        new = form(old)
        if new is old or new == old:
            continue
        lines = {p: o for p, o in layer.origin.items() if p[: len(path)] == path}
        layer.put(path, new, layer.where(path) or "")
        if isinstance(old, list):
            _keep_lines(layer, lines)
    return layer


def _parent(layer: Layer, path: Path) -> dict[str, Any] | None:
    value: Any = layer.data
    for key in path[:-1]:
        value = value.get(key) if isinstance(value, dict) else None
    return value if isinstance(value, dict) else None


def _keep_lines(layer: Layer, lines: dict[Path, str]) -> None:
    """Entries of a list keep their own lines, also inside what they became."""
    for path, origin in lines.items():
        for known in [p for p in layer.origin if p[: len(path)] == path]:
            layer.origin[known] = origin
