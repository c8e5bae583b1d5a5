"""Weights of a Hugging Face folder under canonical names, tensor by tensor, or straight into a sharded model."""

import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import torch

from llmtrain.config.model import ModelConfig
from llmtrain.convert.families import pick_family
from llmtrain.convert.hf_read import model_config, read_config
from llmtrain.convert.names import Counterpart, counterparts
from llmtrain.convert.reading import read_into, read_whole
from llmtrain.convert.shapes import canonical_names, canonical_shapes
from llmtrain.convert.stored import StoredTensors
from llmtrain.errors import UserError

__all__ = ["check", "left_out", "load_into", "model_config", "read_weights"]

# Buffers that older releases stored; they follow from the configuration.
_HARMLESS = re.compile(r"(model\.)?(layers\.\d+\.self_attn\.)?rotary_emb\.(inv_freq|cos_cached|sin_cached)")
_FLOATS = ("F64", "F32", "F16", "BF16")


def read_weights(folder: str | Path, cfg: ModelConfig, *, names: Collection[str] | None = None) -> Iterator[tuple[str, torch.Tensor]]:
    """(canonical name, whole CPU tensor in the stored format), one at a time, in the order of `canonical_names`.

    Args:
        folder: a Hugging Face folder with safetensors, in one file or with an index.
        cfg: the model, as `model_config(folder)` gives it; vocab_size set.
        names: canonical names to read; all if not given.

    Raises:
        UserError: before anything is read, if a tensor is missing, has no place in `cfg`, or has another shape than `cfg` says;
            also for what `StoredTensors` refuses.
    """
    with StoredTensors(folder) as stored:
        places = check(stored, cfg)
        for name in places if names is None else _known(names, cfg):
            yield name, read_whole(stored, places[name])


@torch.no_grad()
def load_into(targets: Mapping[str, torch.Tensor], folder: str | Path, cfg: ModelConfig) -> None:
    """Fill `targets` in place from a Hugging Face folder, cast to each target's dtype, on its device.

    Args:
        targets: canonical name -> plain tensor or DTensor. Of a DTensor only the part that this rank holds is read, without
            communication, so no rank ever holds a whole tensor that is sharded; every rank calls it with its own targets.
        folder: as for `read_weights`, which also says what is refused.
        cfg: the model.

    Raises:
        UserError: as `read_weights`; a target whose name or shape is not the model's.
    """
    shapes = canonical_shapes(cfg)
    for name in _known(targets, cfg):
        if tuple(targets[name].shape) != shapes[name]:
            raise UserError(f"{name} has shape {list(targets[name].shape)} in the model, {list(shapes[name])} by the model section")
    with StoredTensors(folder) as stored:
        places = check(stored, cfg)
        for name, target in targets.items():
            read_into(target, stored, places[name])


def left_out(folder: str | Path, cfg: ModelConfig) -> str | None:
    """What to say of tensors in a Hugging Face folder that have no place here: heads of multi-token prediction. None without."""
    with StoredTensors(folder) as stored:
        layers = sorted({name.split(".")[2] for name in _ahead(stored, cfg)})
    if not layers:
        return None
    return f"{folder}: layers {', '.join(layers)}, which predict further tokens (num_nextn_predict_layers), are left out"


def _ahead(stored: StoredTensors, cfg: ModelConfig) -> set[str]:
    """Tensors of DeepSeek-V3's heads of multi-token prediction, which stand as layers after the last one."""
    if pick_family(cfg) != "deepseek_v3":
        return set()
    extra = read_config(stored.folder).get("num_nextn_predict_layers") or 0
    layers = tuple(f"model.layers.{cfg.layers + head}." for head in range(extra))
    return {name for name in stored.names if name.startswith(layers)}


def check(stored: StoredTensors, cfg: ModelConfig) -> dict[str, Counterpart]:
    """Where each parameter of `cfg` is, once `stored` is known to hold exactly its tensors in their shapes; UserError otherwise."""
    family = pick_family(cfg)
    places = counterparts(cfg, family)
    expected = {stored_name: place.shape for place in places.values() for stored_name in place.names}
    # transformers writes shared experts of width 0 where there are none.
    spare = {name for name in stored.names if _HARMLESS.fullmatch(name) or 0 in stored.shape(name)} | _ahead(stored, cfg)
    spare |= {"lm_head.weight"} if cfg.tie_embeddings else set()
    problems = []
    if missing := sorted(expected.keys() - stored.names):
        hint = "; config.json says tie_word_embeddings false: is the head tied?" if missing == ["lm_head.weight"] else ""
        problems.append(f"missing: {_some(missing)}{hint}")
    if strange := sorted(stored.names - expected.keys() - spare):
        problems.append(f"not expected: {_some(strange)}")
    for name in sorted(expected.keys() & stored.names):
        if stored.shape(name) != expected[name]:
            problems.append(f"{name} has shape {list(stored.shape(name))}, config.json makes it {list(expected[name])}")
        elif stored.dtype(name) not in _FLOATS:
            problems.append(f"{name} is stored as {stored.dtype(name)}; allowed: {', '.join(_FLOATS)}")
    for name, place in places.items():
        if place.stack and len(formats := {stored.dtype(n) for n in place.names if n in stored.names}) > 1:
            problems.append(f"the experts of {name} are stored in several formats: {', '.join(sorted(formats))}")
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise UserError(f"{stored.folder} does not hold the weights of its {family} model: {'; '.join(problems[:5])}{more}")
    return places


def _known(names: Collection[str], cfg: ModelConfig) -> list[str]:
    if strange := sorted(set(names) - set(canonical_names(cfg))):
        raise UserError(f"the model has no Hugging Face counterpart of {_some(strange)}")
    return list(names)


def _some(names: list[str], limit: int = 5) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
