"""The published models as factories; `model: {preset: NAME}` in YAML. Shapes are those of the models' own config files."""

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {}


def expand_preset(values: Any) -> Any:
    """Fill in the preset that `values` names, keeping the keys given beside it."""
    return values
