"""The published models; `model: {preset: NAME}` in YAML. Shapes are those of the models' own config files or papers."""

import copy
import difflib
from typing import Any

from llmtrain.config import layer as layers
from llmtrain.config import shortforms
from llmtrain.config.errors import ConfigError
from llmtrain.config.layer import Layer
from llmtrain.config.published_dense import DENSE
from llmtrain.config.published_experts import EXPERTS

PRESETS: dict[str, dict[str, Any]] = DENSE | EXPERTS


def preset_layer(name: Any, origin: str | None = None) -> Layer:
    """The preset `name` as the `model` section of a layer.

    Raises:
        ConfigError: no published model of that name.
    """
    if name not in PRESETS:
        near = difflib.get_close_matches(str(name), list(PRESETS), 1, 0.5)
        hint = f"; did you mean {near[0]}?" if near else ""
        came = f" ({origin})" if origin else ""
        raise ConfigError(f"model.preset: {name!r} is not allowed{came}; allowed: one of {', '.join(PRESETS)}{hint}")
    return layers.whole({"model": copy.deepcopy(PRESETS[name])}, f"preset {name}")


def expand_preset(values: Any) -> Any:
    """The model section with the preset that it names filled in under the keys given beside it; the section itself is not changed."""
    values = shortforms.model(values)
    if not isinstance(values, dict) or values.get("preset") is None:
        return values
    return layers.over(preset_layer(values["preset"]), layers.whole({"model": values}, "")).data["model"]
