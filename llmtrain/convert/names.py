"""Canonical parameters, and their names in Hugging Face files, per family. One map serves export and import.

`counterparts` is the whole of it: where each parameter is in the file, and how it stands there.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from llmtrain.config.model import ModelConfig
from llmtrain.convert.shapes import canonical_shapes
from llmtrain.errors import UserError

_OUTSIDE = {"embedding.weight": "model.embed_tokens.weight", "final_norm.weight": "model.norm.weight", "head.weight": "lm_head.weight"}
_BLOCK = {
    "attention_norm": "input_layernorm",
    # Llama calls the norm before the feed-forward branch post_attention_layernorm; openPangu uses that name for what it says.
    "ffn_norm": "post_attention_layernorm",
    "attention.q_proj": "self_attn.q_proj",
    "attention.k_proj": "self_attn.k_proj",
    "attention.v_proj": "self_attn.v_proj",
    "attention.out_proj": "self_attn.o_proj",
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
    "ffn.gate_proj": "mlp.gate_proj",
    "ffn.up_proj": "mlp.up_proj",
    "ffn.down_proj": "mlp.down_proj",
}
_SANDWICH = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_mlp_layernorm",
    "post_ffn_norm": "post_mlp_layernorm",
}
_MIXTRAL = {
    "ffn.router": "block_sparse_moe.gate",
    "ffn.experts.gate_proj": "block_sparse_moe.experts.*.w1.weight",
    "ffn.experts.up_proj": "block_sparse_moe.experts.*.w3.weight",
    "ffn.experts.down_proj": "block_sparse_moe.experts.*.w2.weight",
}
_EXPERTS = {
    "ffn.router": "mlp.gate",
    "ffn.experts.gate_proj": "mlp.experts.*.gate_proj.weight",
    "ffn.experts.up_proj": "mlp.experts.*.up_proj.weight",
    "ffn.experts.down_proj": "mlp.experts.*.down_proj.weight",
}
_DEEPSEEK = {
    "attention.q_down_proj": "self_attn.q_a_proj",
    "attention.q_norm": "self_attn.q_a_layernorm",
    "attention.q_up_proj": "self_attn.q_b_proj",
    "attention.kv_down_proj": "self_attn.kv_a_proj_with_mqa",
    "attention.kv_norm": "self_attn.kv_a_layernorm",
    "attention.kv_up_proj": "self_attn.kv_b_proj",
    "ffn.router.bias": "mlp.gate.e_score_correction_bias",
    "ffn.shared.gate_proj": "mlp.shared_experts.gate_proj",
    "ffn.shared.up_proj": "mlp.shared_experts.up_proj",
    "ffn.shared.down_proj": "mlp.shared_experts.down_proj",
}
_INSIDE = {
    "openpangu": _BLOCK | _SANDWICH,
    "mixtral": _BLOCK | _MIXTRAL,
    "qwen3_moe": _BLOCK | _EXPERTS,
    "deepseek_v3": _BLOCK | _EXPERTS | _DEEPSEEK,
    # What q_b_proj is where queries come straight from the hidden state.
    "deepseek_v3, no query rank": _BLOCK | _EXPERTS | _DEEPSEEK | {"attention.q_up_proj": "self_attn.q_proj"},
}


@dataclass(frozen=True)
class Counterpart:
    """What a canonical parameter is in a Hugging Face file."""

    names: tuple[str, ...]
    """The tensor; of a stack of matrices one for each of them, transposed."""
    shape: tuple[int, ...]
    """Of each of these tensors."""
    stack: bool = False
    """Whether it is a stack."""
    rows: Sequence[int] | None = None
    """The file's row for each row of the parameter; the same if not given."""

    def split(self, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) in the file, of the whole parameter. Views where nothing but an axis moves."""
        if self.stack:
            yield from zip(self.names, tensor.transpose(1, 2))
        elif self.rows is not None:
            yield self.names[0], torch.empty_like(tensor).index_copy_(0, torch.tensor(self.rows, device=tensor.device), tensor)
        else:
            yield self.names[0], tensor


def counterparts(cfg: ModelConfig, family: str) -> dict[str, Counterpart]:
    """Canonical name -> counterpart, of every parameter of `cfg`, whose family is `family` (see families.pick_family)."""
    naming = f"{family}, no query rank" if family == "deepseek_v3" and cfg.attention.query_rank is None else family
    return {name: _counterpart(name, shape, cfg, naming) for name, shape in canonical_shapes(cfg).items()}


def _counterpart(name: str, shape: tuple[int, ...], cfg: ModelConfig, naming: str) -> Counterpart:
    if len(shape) == 3:
        return Counterpart(tuple(to_hf(name, naming, expert=e) for e in range(shape[0])), (shape[2], shape[1]), stack=True)
    rows, a = None, cfg.attention
    if name.endswith("attention.q_up_proj.weight"):
        rows = _unpaired(a.heads, a.nope_dim, a.rope_dim)
    elif name.endswith("attention.kv_down_proj.weight"):
        rows = _unpaired(1, a.kv_rank, a.rope_dim)
    return Counterpart((to_hf(name, naming),), shape, rows=rows)


@cache
def _unpaired(parts: int, plain: int, rotated: int) -> list[int]:
    """The file's row of each row, in `parts` runs of `plain` rows as they are and `rotated` that RoPE rotates: in DeepSeek's files the
    two numbers of a rotated pair stand beside each other, here half a head apart."""
    run = [*range(plain), *range(plain, plain + rotated, 2), *range(plain + 1, plain + rotated, 2)]
    return [part * len(run) + row for part in range(parts) for row in run]


def to_hf(name: str, family: str, *, expert: int = 0) -> str:
    """Hugging Face name of a canonical parameter, e.g. blocks.0.ffn.up_proj.weight -> model.layers.0.mlp.up_proj.weight; of a stack of
    experts that of one of them."""
    inside = _INSIDE.get(family, _BLOCK)
    return _rename(name, outside=_OUTSIDE, inside=inside, pattern=r"blocks\.(\d+)\.(.+)", prefix="model.layers").replace("*", str(expert))


def from_hf(name: str, family: str) -> str:
    """Canonical name of a Hugging Face parameter; the inverse of `to_hf`, but for which of the experts it is."""
    outside = {hf: mine for mine, hf in _OUTSIDE.items()}
    inside = {hf: mine for mine, hf in _INSIDE.get(family, _BLOCK).items()}
    if family == "deepseek_v3":
        inside["self_attn.q_proj"] = "attention.q_up_proj"
    known = re.sub(r"\.experts\.\d+\.", ".experts.*.", name)
    return _rename(known, outside=outside, inside=inside, pattern=r"model\.layers\.(\d+)\.(.+)", prefix="blocks")


def _rename(name: str, *, outside: dict[str, str], inside: dict[str, str], pattern: str, prefix: str) -> str:
    """`inside` maps whole parameters, or modules with a weight and perhaps a bias."""
    if name in outside:
        return outside[name]
    if match := re.fullmatch(pattern, name):
        layer, path = match.groups()
        module, _, kind = path.rpartition(".")
        if path in inside:
            return f"{prefix}.{layer}.{inside[path]}"
        if module in inside and kind in ("weight", "bias"):
            return f"{prefix}.{layer}.{inside[module]}.{kind}"
    raise UserError(f"parameter {name!r} has no counterpart in the other naming; known modules: {', '.join(inside)}")
