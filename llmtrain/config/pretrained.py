"""`model: {pretrained: PATH}`: the shape, and the tokenizer, of a model that exists already. Needs no torch."""

import copy
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from llmtrain.config import layer as layers
from llmtrain.config.errors import ConfigError
from llmtrain.config.layer import Layer
from llmtrain.errors import UserError

if TYPE_CHECKING:
    from llmtrain.config.lora import LoraConfig
    from llmtrain.config.model import ModelConfig

# What may differ from the stored model: where it starts does not matter any more, and RoPE is stretched on purpose.
_FREE = ("preset", "pretrained", "init", "max_seq_len", "norm.c_attention", "norm.c_ffn", "position.base", "position.scaling")
# How experts are trained, which no weight depends on.
_FREE += ("ffn.balance", "ffn.capacity", "ffn.router.z_loss", "ffn.router.force_balance", "mtp.loss_weight")
_SANDWICHES = ("sandwich", "depth_scaled_sandwich")


def run_folder(path: str | Path) -> Path | None:
    """The run folder that `path` is, or that the checkpoint `path` lies in; None if there is none (then it is a Hugging Face folder)."""
    path = Path(path)
    for folder in (path, *path.resolve().parents[1:2]):
        if (folder / "config.yaml").is_file():
            return folder
    return None


def pretrained_values(path: str | Path) -> dict[str, Any]:
    """The `model` section of the model in `path`: a Hugging Face folder, a run folder, or a checkpoint in one.

    Raises:
        ConfigError: nothing there, or a model that cannot be read.
    """
    from llmtrain.convert.hf_read import CONFIG, model_values, read_config

    path = Path(path)
    try:
        if run := run_folder(path):
            return _run_values(run, path)
        if not (path / CONFIG).is_file():
            raise UserError(f"no {CONFIG} (Hugging Face) and no config.yaml (run folder) there; `llmtrain convert` reads a GGUF file")
        return model_values(read_config(path), where=str(path / CONFIG))
    except UserError as error:
        raise ConfigError(f"model.pretrained: {path}: {error}") from None


def pretrained_tokenizer(path: str | Path) -> str | None:
    """The folder or file of the model's own tokenizer; None if it has none."""
    path = Path(path)
    if run := run_folder(path):
        given = (_read_yaml(run / "config.yaml").get("tokenizer") or {}).get("path")
        return given if given and Path(given).exists() else _holding_tokenizer(run / "tokenizer")
    return _holding_tokenizer(path)


def trained_adapters(run: Path) -> "LoraConfig":
    """The adapters that the run in this folder trained; of rank 0 if none."""
    from llmtrain.config.lora import LoraConfig

    return LoraConfig.model_validate(_read_yaml(run / "config.yaml").get("lora") or {})


def pretrained_layer(path: str) -> Layer:
    """Model section and tokenizer of `path` as a layer, to be laid under what the run says."""
    values: dict[str, Any] = {"model": pretrained_values(path)}
    if tokenizer := pretrained_tokenizer(path):
        values["tokenizer"] = {"path": tokenizer}
    return layers.whole(values, f"pretrained {path}")


def expand_model(values: Any) -> Any:
    """The model section with that of `pretrained` filled in under the keys given beside it; the section itself is not changed."""
    if not _is_open(values):
        return values
    if values.get("preset") is not None:
        raise ValueError("preset and pretrained each give the whole shape; give one of them")
    base = layers.whole({"model": pretrained_values(values["pretrained"])}, "")
    return layers.over(base, layers.whole({"model": values}, "")).data["model"]


def expand_run(values: Any) -> Any:
    """The whole configuration, with the pretrained model's tokenizer if it names none."""
    model = values.get("model") if isinstance(values, dict) else None
    if not _is_open(model) or "path" in (values.get("tokenizer") or {}):
        return values
    path = pretrained_tokenizer(model["pretrained"])
    return values if path is None else values | {"tokenizer": {**(values.get("tokenizer") or {}), "path": path}}


def is_complete(model: dict[str, Any]) -> bool:
    """Whether a section says everything, as a run's own config.yaml does, which must be readable when the pretrained folder is gone."""
    from llmtrain.config.model import ModelConfig

    return ModelConfig.model_fields.keys() <= model.keys()


def _is_open(model: Any) -> bool:
    """Whether `pretrained` has something to fill in."""
    return isinstance(model, dict) and isinstance(model.get("pretrained"), str) and not is_complete(model)


def conflicts(cfg: "ModelConfig") -> list[str]:
    """Where `cfg` differs from the model of `cfg.pretrained` in a way that its weights do not allow; one message each."""
    differing = [(name, mine, theirs) for name, mine, theirs in _differences(cfg) if not name.startswith(_FREE)]
    return [
        f"{name} {_shown(mine)} conflicts with pretrained {cfg.pretrained}, which has {_shown(theirs)}; leave {name} out"
        for name, mine, theirs in differing
        if not (name == "norm.placement" and {mine, theirs} <= set(_SANDWICHES))
        # A bias may be added, and begins at zero; taking one away would send tokens to other experts.
        and not (name == "ffn.router.bias_rate" and mine is not None)
    ]


def departures(cfg: "ModelConfig") -> list[str]:
    """Where `cfg` departs from the model of `cfg.pretrained` as it may, initialisation aside: one `name value (pretrained: value)` each."""
    spoken = ("max_seq_len", "position", "ffn")
    return [f"{n} {_shown(mine)} (pretrained: {_shown(theirs)})" for n, mine, theirs in _differences(cfg) if n.startswith(spoken)]


def stored_model(cfg: "ModelConfig") -> "ModelConfig":
    """The model of `cfg.pretrained` as it is stored."""
    return type(cfg).model_validate(pretrained_values(cfg.pretrained))


def _differences(cfg: "ModelConfig") -> list[tuple[str, Any, Any]]:
    """(dotted name, value, value of the pretrained model) of everything that differs."""
    stored = stored_model(cfg)
    mine, theirs = (_leaves(model.model_dump(mode="json")) for model in (cfg, stored))
    # Numbers that follow from others count as what they amount to.
    for leaves, model in ((mine, cfg), (theirs, stored)):
        leaves |= {"attention.head_dim": model.head_dim, "attention.kv_heads": model.kv_heads}
    return [(n, mine.get(n), theirs.get(n)) for n in dict.fromkeys([*mine, *theirs]) if mine.get(n) != theirs.get(n)]


def _leaves(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def _shown(value: Any) -> str:
    return json.dumps(value)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} is no configuration of a run")
    return values


def _run_values(run: Path, path: Path) -> dict[str, Any]:
    """The model section of a run's config.yaml, with the RoPE base of the phase that the checkpoint ends in."""
    values = _read_yaml(run / "config.yaml")
    model = copy.deepcopy(values.get("model") or {})
    for name in ("preset", "pretrained"):
        model.pop(name, None)
    if model.get("position", {}).get("kind", "rope") == "rope" and (base := _trained_base(values, path if path != run else run / "latest")):
        model.setdefault("position", {})["base"] = base
    return model


def _trained_base(values: dict[str, Any], checkpoint: Path) -> float | None:
    from llmtrain.config.fields import root
    from llmtrain.layout.steps import StepPlan
    from llmtrain.plugins import load_plugins

    try:
        step = json.loads((checkpoint / "meta.json").read_bytes())["step"]
    except (OSError, ValueError, KeyError):
        return None  # loading the weights says what is wrong with the checkpoint
    if not step:
        return None
    load_plugins(values.get("plugins") or [])
    return StepPlan.from_config(root().model_validate(values)).step(step - 1).rope_base


def _holding_tokenizer(folder: Path) -> str | None:
    one = (folder / "tokenizer.json").is_file() or len(list(folder.glob("*.model"))) == 1
    return str(folder) if one else None
