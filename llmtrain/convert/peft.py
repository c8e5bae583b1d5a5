"""Adapters as a folder of the PEFT library: adapter_config.json and adapter_model.safetensors."""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from llmtrain.config.lora import LoraConfig, adapted
from llmtrain.config.model import ModelConfig
from llmtrain.convert.adapters import A, B
from llmtrain.convert.companions import copy_companions
from llmtrain.convert.export import write_tokenizer
from llmtrain.convert.families import pick_family
from llmtrain.convert.folders import whole_folder
from llmtrain.convert.names import Counterpart, counterparts
from llmtrain.errors import UserError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."


def export_peft(
    folder: Path,
    cfg: ModelConfig,
    lora: LoraConfig,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    tokenizer=None,
    dtype: torch.dtype | None = None,
    companions: Path | None = None,
) -> Path:
    """Write an adapter's folder, which `peft.PeftModel.from_pretrained(model, folder)` reads; it appears, or replaces an older one, whole.

    Args:
        folder: where to.
        cfg: the model beside whose weights the adapters stand.
        lora: what the adapters are; `base_model_name_or_path` becomes `model.pretrained`.
        tensors: (canonical name, whole CPU tensor); what is no matrix of an adapter is passed over.
        tokenizer, dtype, companions: as `export_hf`.

    Raises:
        UserError: no family fits, or a matrix is missing.
    """
    places, written = adapter_places(cfg, lora), {}
    for name, tensor in tensors:
        if name in places:
            ((stored, whole),) = places[name].split(tensor.detach())
            written[stored] = whole.to(dtype or whole.dtype).contiguous()
    if missing := sorted({place.names[0] for place in places.values()} - written.keys()):
        raise UserError(f"export: missing {missing[:5]}")
    beside = companions if companions is not None or tokenizer is None else tokenizer.path.parent
    with whole_folder(Path(folder)) as partial:
        save_file(written, partial / WEIGHTS, metadata={"format": "pt"})
        (partial / CONFIG).write_text(json.dumps(_config(cfg, lora, written), indent=2) + "\n", encoding="utf-8")
        if tokenizer is not None:
            write_tokenizer(partial, tokenizer)
        if beside is not None:
            copy_companions(beside, partial)
    return Path(folder)


def adapter_places(cfg: ModelConfig, lora: LoraConfig) -> dict[str, Counterpart]:
    """Canonical name -> where it is in the file, of every matrix. B's rows stand in the order of its weight's."""
    weights = counterparts(cfg, pick_family(cfg))
    return {name: place for projection in adapted(lora, cfg) for name, place in _pair(projection, weights, lora.rank)}


def _pair(projection: str, weights: Mapping[str, Counterpart], rank: int) -> Iterator[tuple[str, Counterpart]]:
    weight = weights[f"{projection}.weight"]
    module, (outputs, inputs) = f"{_PREFIX}{weight.names[0].removesuffix('.weight')}", weight.shape
    yield f"{projection}.{A}", Counterpart((f"{module}.lora_A.weight",), (rank, inputs))
    yield f"{projection}.{B}", Counterpart((f"{module}.lora_B.weight",), (outputs, rank), rows=weight.rows)


def _config(cfg: ModelConfig, lora: LoraConfig, written: Iterable[str]) -> dict:
    """What PEFT needs to know; the rest are its defaults."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": cfg.pretrained,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "target_modules": sorted({name.split(".")[-3] for name in written}),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
