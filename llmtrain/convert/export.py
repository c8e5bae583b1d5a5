"""A trained model as a Hugging Face folder: safetensors, config.json, tokenizer."""

import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

from llmtrain.config.model import ModelConfig
from llmtrain.convert.hf_config import hf_config
from llmtrain.convert.names import pick_family, to_hf
from llmtrain.errors import UserError

OPENPANGU_NOTE = """# A sandwich-norm model under openPangu's names

`input_layernorm`, `post_attention_layernorm`, `pre_mlp_layernorm` and `post_mlp_layernorm` are the four norms of a block, as in the public
openPangu code with `sandwich_norm: true`; without it that code reuses `post_attention_layernorm` as the norm before the feed-forward
branch. transformers has no built-in class for it: load the safetensors file with openPangu's own modelling code, or with llmtrain's name
map (`llmtrain.convert.names.from_hf`).
"""


def export_hf(
    folder: Path,
    cfg: ModelConfig,
    weights: Iterable[tuple[str, torch.Tensor]],
    *,
    tokenizer=None,
    dtype: torch.dtype | None = None,
    shard_bytes: int = 5_000_000_000,
) -> Path:
    """Write `weights` ((canonical name, whole CPU tensor), streamed) to `folder`; it appears, or replaces an older one, only when complete.

    `tokenizer` (bos_id, eod_id, copy_to) is copied along. `dtype` casts, None keeps. At most one shard is held in memory.
    Raises UserError if no family fits or names are missing or unknown.
    """
    family, folder = pick_family(cfg), Path(folder)
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    written, stored = _write_shards(partial, _renamed(weights, family, dtype), shard_bytes)
    _check_complete(written, cfg, family)
    _write_json(partial / "config.json", hf_config(cfg, family, dtype=stored, **_special_tokens(tokenizer)))
    _write_json(partial / "generation_config.json", {f"{name}_token_id": token for name, token in _special_tokens(tokenizer).items()})
    if family == "openpangu":
        (partial / "README.md").write_text(OPENPANGU_NOTE)
    if tokenizer is not None and tokenizer.copy_to(partial).suffix == ".model":
        _write_json(partial / "tokenizer_config.json", _sentencepiece_config(tokenizer))
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    return folder


def _renamed(weights: Iterable[tuple[str, torch.Tensor]], family: str, dtype: torch.dtype | None) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in weights:
        yield to_hf(name, family), tensor.detach().to(dtype or tensor.dtype).contiguous()


def _write_shards(folder: Path, tensors: Iterator[tuple[str, torch.Tensor]], shard_bytes: int) -> tuple[set[str], str]:
    """Write the shards and, if there are several, their index; returns the names and the number format."""
    shards: list[list[str]] = []
    held: dict[str, torch.Tensor] = {}
    size = total = 0
    stored = "float32"

    def flush() -> None:
        nonlocal held, size
        save_file(held, folder / f"shard-{len(shards)}.safetensors", metadata={"format": "pt"})
        shards.append(list(held))
        held, size = {}, 0

    for name, tensor in tensors:
        if held and size + tensor.nbytes > shard_bytes:
            flush()
        held[name] = tensor
        size, total, stored = size + tensor.nbytes, total + tensor.nbytes, str(tensor.dtype).removeprefix("torch.")
    flush()
    if len(shards) == 1:
        (folder / "shard-0.safetensors").rename(folder / "model.safetensors")
    else:
        files = [f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors" for index in range(len(shards))]
        for index, file in enumerate(files):
            (folder / f"shard-{index}.safetensors").rename(folder / file)
        where = {name: file for file, names in zip(files, shards) for name in names}
        _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": where})
    return {name for names in shards for name in names}, stored


def _check_complete(written: set[str], cfg: ModelConfig, family: str) -> None:
    expected = {to_hf(name, family) for name in canonical_names(cfg)}
    if written != expected:
        missing, strange = sorted(expected - written), sorted(written - expected)
        raise UserError(f"export: missing {missing[:5] or 'nothing'}, not expected {strange[:5] or 'nothing'}")


def canonical_names(cfg: ModelConfig) -> list[str]:
    """Every parameter of a model that has a Hugging Face family."""
    branch = ["q_proj", "k_proj", "v_proj", "out_proj"]
    modules = [f"attention.{name}" for name in branch + ["q_norm", "k_norm"] * cfg.attention.qk_norm]
    modules += ["attention_norm", "ffn_norm", "ffn.gate_proj", "ffn.up_proj", "ffn.down_proj"]
    modules += ["post_attention_norm", "post_ffn_norm"] if cfg.norm.placement != "pre" else []
    names = [f"blocks.{layer}.{module}.weight" for layer in range(cfg.layers) for module in modules]
    if cfg.attention.qkv_bias:
        names += [f"blocks.{layer}.attention.{name}.bias" for layer in range(cfg.layers) for name in branch[:3]]
    return ["embedding.weight", "final_norm.weight", *names] + ([] if cfg.tie_embeddings else ["head.weight"])


def _special_tokens(tokenizer) -> dict:
    return {} if tokenizer is None else {"bos": tokenizer.bos_id, "eos": tokenizer.eod_id}


def _sentencepiece_config(tokenizer) -> dict:
    """Makes transformers encode as the sentencepiece model does, which may or may not put a space before the text."""
    prefixed = tokenizer.piece(tokenizer.encode("x")[0]).startswith("\u2581")
    return {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": False, "add_prefix_space": prefixed}


def _write_json(path: Path, values: dict) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n")
