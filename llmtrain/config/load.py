"""From a YAML file and a command line to one validated `RunConfig` that knows where every value came from."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from llmtrain.config import fields, yamlfile
from llmtrain.config import layer as layers
from llmtrain.config import overrides as words
from llmtrain.config.errors import ConfigError
from llmtrain.config.explain import explain
from llmtrain.config.extend import without_unused
from llmtrain.config.layer import Layer, dotted
from llmtrain.config.pretrained import is_complete, pretrained_layer
from llmtrain.config.published import preset_layer
from llmtrain.config.run import RunConfig
from llmtrain.config.shortforms import expand_short_forms
from llmtrain.plugins import load_plugins


@dataclass(frozen=True)
class LoadedConfig:
    """A run's configuration and, per dotted path, `file.yaml:LINE`, `command line`, `preset NAME` or `default`."""

    run: RunConfig
    origin: dict[str, str]


def load(path: str | Path | dict[str, Any] | None, overrides: list[str]) -> LoadedConfig:
    """Read `path` with the files it extends, lay the command line over it, and validate the whole once.

    Args:
        path: a YAML file; None starts from the defaults; a dict stands for a file's content, without `extends`.
        overrides: words such as `["--train.steps", "200", "--no-checkpoint.asynchronous"]`.

    Raises:
        ConfigError: one message per thing wrong, each with the option, the value, what is allowed and where it came from.
    """
    merged = read(path)
    if load_plugins(named_plugins(merged, overrides)):  # what follows depends on the options that they add
        merged = read(path)
    return validated(words.apply(merged, words.parse(list(overrides))))


def read(path: str | Path | dict[str, Any] | None) -> Layer:
    """The file `path` with the files it extends, not yet validated; None is an empty one."""
    if isinstance(path, dict):
        return expand_short_forms(layers.whole(path, "given"))
    return read_file(Path(path)) if path is not None else Layer({}, {})


def named_plugins(merged: Layer, overrides: list[str]) -> list[str]:
    """`plugins` as a file and the command line have it; a value that is no list of names is left to validation."""
    layer = layers.whole({key: value for key, value in merged.data.items() if key == "plugins"}, "")
    names = words.apply(layer, [pair for pair in words.parse(list(overrides)) if pair[0][0] == "plugins"]).data.get("plugins")
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


def validated(merged: Layer) -> LoadedConfig:
    """The run that the layer describes, after short forms and the model's preset are written out."""
    merged = expand_short_forms(merged)
    model = merged.data.get("model")
    if isinstance(model, dict) and model.get("preset") is not None:
        merged = layers.over(preset_layer(model["preset"], merged.where(("model", "preset"))), merged)
    elif isinstance(model, dict) and isinstance(model.get("pretrained"), str) and not is_complete(model):
        merged = layers.over(pretrained_layer(model["pretrained"]), merged)
    try:
        run = fields.root().model_validate(merged.data)
    except ValidationError as error:
        raise explain(error, merged) from None
    return LoadedConfig(run, origins(run, merged))


def origins(run: RunConfig, merged: Layer) -> dict[str, str]:
    """Where every value of `run` came from, by dotted path."""
    return {dotted(path): merged.origin.get(path) or "default" for path, _ in leaves(run.model_dump(mode="json"))}


def leaves(value: Any, path: layers.Path = ()) -> list[tuple[layers.Path, Any]]:
    """The (path, value) pairs of all plain values; a list of plain values counts as one."""
    if isinstance(value, dict) and value:
        return [leaf for key, item in value.items() for leaf in leaves(item, (*path, key))]
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        return [leaf for index, item in enumerate(value) for leaf in leaves(item, (*path, index))]
    return [(path, value)]


def read_file(path: Path, chain: tuple[Path, ...] = ()) -> Layer:
    """The YAML file `path` laid over the files that its `extends` names, in their order."""
    path = path.expanduser()
    real = path.resolve()
    if real in chain:
        raise ConfigError(f"extends goes in a circle: {' -> '.join(_shown(p) for p in (*chain, real))}")
    if not path.is_file():
        raise ConfigError(f"{path}: no such configuration file{_extended_by(chain)}")
    own = expand_short_forms(yamlfile.read(path, _shown(real)))
    parents = own.data.pop("extends", None)
    parents = [parents] if isinstance(parents, str) else parents or []
    if not isinstance(parents, list) or not all(isinstance(p, str) for p in parents):
        raise ConfigError(f"extends: {parents!r} is not allowed ({own.origin[('extends',)]}); allowed: a file name or a list of them")
    own.origin = {p: o for p, o in own.origin.items() if p[0] != "extends"}
    merged = Layer({}, {})
    for parent in parents:
        merged = layers.over(merged, read_file(path.parent / Path(parent).expanduser(), (*chain, real)))
    return layers.over(merged, own)


def _extended_by(chain: tuple[Path, ...]) -> str:
    return f" (extends in {_shown(chain[-1])})" if chain else ""


def _shown(path: Path) -> str:
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def to_yaml(run: RunConfig) -> str:
    """Every value of `run` as YAML; `load` of it gives an equal run."""
    return yamlfile.dump(without_unused(run.model_dump(mode="json")))


def schema() -> dict[str, Any]:
    """JSON Schema of a configuration file, for editors."""
    result = fields.root().model_json_schema()
    result["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    result["properties"]["extends"] = {
        "description": "Files, relative to this one, whose values this file's are laid over.",
        "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
    }
    return result
