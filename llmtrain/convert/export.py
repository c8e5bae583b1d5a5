"""A trained model as a Hugging Face folder: safetensors, config.json, tokenizer."""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from llmtrain.config.model import ModelConfig
from llmtrain.convert.companions import copy_companions, token_ids, write_generation
from llmtrain.convert.families import pick_family
from llmtrain.convert.folders import whole_folder
from llmtrain.convert.hf_config import hf_config
from llmtrain.convert.names import Counterpart, counterparts
from llmtrain.convert.shapes import canonical_shapes, keeps_format
from llmtrain.convert.shards import ShardWriter
from llmtrain.errors import UserError

OPENPANGU_NOTE = """# A sandwich-norm model under openPangu's names

`input_layernorm`, `post_attention_layernorm`, `pre_mlp_layernorm` and `post_mlp_layernorm` are the four norms of a block, as in the public
openPangu code with `sandwich_norm: true`; without it that code reuses `post_attention_layernorm` as the norm before the feed-forward
branch.

What loads it:

- llmtrain: `llmtrain convert FOLDER RUN --to native`, or `model: {pretrained: FOLDER}`.
- transformers, which has no built-in class and refuses the folder until it is given one:

      from llmtrain.convert.openpangu import register
      from transformers import AutoModelForCausalLM
      register()
      model = AutoModelForCausalLM.from_pretrained("FOLDER")

- vLLM's `PanguEmbeddedForCausalLM` builds this block when `sandwich_norm` is true; it wants the configuration class of an openPangu
  Embedded release beside the weights. It was read, not run on this folder.

Do NOT load it with the modelling code of openPangu Embedded itself: that is a Llama block, which would take
`post_attention_layernorm` for the norm before the feed-forward branch, ignore the two others and compute something else.
`llmtrain.convert.names.from_hf(name, "openpangu")` gives llmtrain's own names back.
"""


def export_hf(
    folder: Path,
    cfg: ModelConfig,
    weights: Iterable[tuple[str, torch.Tensor]],
    *,
    tokenizer=None,
    dtype: torch.dtype | None = None,
    shard_bytes: int = 5_000_000_000,
    rope_base: float | None = None,
    companions: Path | None = None,
) -> Path:
    """Write a Hugging Face folder; it appears, or replaces an older one, only when complete.

    Args:
        folder: where to.
        cfg: the model, vocab_size set.
        weights: (canonical name, whole CPU tensor), streamed: at most one shard is held in memory, and one stack of experts. A tied head is
            not among them.
        tokenizer: a llmtrain.data.tokenizer.Tokenizer to copy along; its bos_id and eod_id become the model's, unless generation settings
            beside it say otherwise.
        dtype: cast to this; None keeps. The biases of routers keep theirs.
        shard_bytes: largest shard; a tensor above it gets a shard of its own.
        rope_base: the RoPE base of the last phase of training, if it is not `model.position.base`.
        companions: folder whose tokenizer files, chat template and generation settings come along; the tokenizer's own if not given.

    Raises:
        UserError: no family fits, or names or sizes are not those of `cfg`.
    """
    family, folder = pick_family(cfg), Path(folder)
    beside = companions if companions is not None or tokenizer is None else tokenizer.path.parent
    with whole_folder(folder) as partial:
        writer, places = ShardWriter(partial, shard_bytes), counterparts(_with_biases(cfg, family), family)
        absent = {name: place.shape for name, place in places.items() if name not in canonical_shapes(cfg)}
        writer.write(_stored(_completed(weights, absent), places, dtype))
        _check_complete(writer.sizes, places)
        if tokenizer is not None:
            write_tokenizer(partial, tokenizer)
        if beside is not None:
            copy_companions(beside, partial)
        ids = _token_ids(tokenizer, beside)
        stored = str(writer.dtypes["model.embed_tokens.weight"]).removeprefix("torch.")
        _write_json(partial / "config.json", hf_config(cfg, family, dtype=stored, rope_base=rope_base) | ids)
        write_generation(partial, ids)
        if family == "openpangu":
            (partial / "README.md").write_text(OPENPANGU_NOTE)
    return folder


def _token_ids(tokenizer, beside: Path | None) -> dict[str, Any]:
    """What the model's own files say, else the tokenizer."""
    own = {} if tokenizer is None else {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eod_id}
    return own | (token_ids(beside) if beside is not None else {})


def _with_biases(cfg: ModelConfig, family: str) -> ModelConfig:
    """`cfg` with a bias in every router if the family has one whether or not it is used."""
    if family != "deepseek_v3" or cfg.ffn.kind != "moe" or cfg.ffn.router.bias_rate is not None:
        return cfg
    router = cfg.ffn.router.model_copy(update={"bias_rate": 0.0})
    return cfg.model_copy(update={"ffn": cfg.ffn.model_copy(update={"router": router})})


def _completed(weights: Iterable[tuple[str, torch.Tensor]], absent: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, torch.Tensor]]:
    """`weights`, then zeros for what the model does without."""
    yield from weights
    yield from ((name, torch.zeros(shape)) for name, shape in absent.items())


def _stored(
    weights: Iterable[tuple[str, torch.Tensor]], places: Mapping[str, Counterpart], dtype: torch.dtype | None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and tensors as they stand in the file."""
    for name, tensor in weights:
        if name not in places:
            raise UserError(f"export: not expected {[name]}, which the model section does not describe")
        wanted = tensor.dtype if dtype is None or keeps_format(name) else dtype
        for stored, part in places[name].split(tensor.detach()):
            yield stored, part.to(wanted).contiguous()


def _check_complete(sizes: dict[str, int], places: Mapping[str, Counterpart]) -> None:
    expected = {stored: math.prod(place.shape) for place in places.values() for stored in place.names}
    if missing := sorted(expected.keys() - sizes.keys()):
        raise UserError(f"export: missing {missing[:5]}")
    needed, given = sum(expected.values()), sum(sizes.values())
    if given != needed:
        raise UserError(f"export: {given:,} parameters were given, the model section describes {needed:,}; shapes differ from it")


def write_tokenizer(folder: Path, tokenizer) -> None:
    """Copy the tokenizer and say how to read it where its own tokenizer_config.json does not come along."""
    file, config = tokenizer.copy_to(folder), folder / "tokenizer_config.json"
    if config.exists():
        return
    if file.suffix == ".model":
        # transformers then encodes as the sentencepiece model does, which may or may not put a space before the text. Where it does,
        # transformers puts none before a text that begins with a space.
        prefixed = tokenizer.piece(tokenizer.encode("x")[0]).startswith("\u2581")
        _write_json(config, {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": False, "add_prefix_space": prefixed})
    else:
        names = {
            f"{name}_token": tokenizer.piece(token)
            for name, token in (("bos", tokenizer.bos_id), ("eos", tokenizer.eod_id))
            if token is not None
        }
        _write_json(config, {"tokenizer_class": "PreTrainedTokenizerFast"} | names)


def _write_json(path: Path, values: dict) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n")
