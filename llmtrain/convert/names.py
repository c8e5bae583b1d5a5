"""Canonical parameter names <-> Hugging Face names, per family. One map serves export and import."""

import re

from llmtrain.config.model import ModelConfig
from llmtrain.errors import UserError

FAMILIES = ("llama", "qwen2", "qwen3", "openpangu")

_OUTSIDE = {"embedding.weight": "model.embed_tokens.weight", "final_norm.weight": "model.norm.weight", "head.weight": "lm_head.weight"}
_BLOCK = {
    "attention_norm": "input_layernorm",
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
# Llama calls the norm before the feed-forward branch post_attention_layernorm; openPangu uses that name for what it says.
_NORMS = {"ffn_norm": "post_attention_layernorm"}
_SANDWICH_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_mlp_layernorm",
    "post_ffn_norm": "post_mlp_layernorm",
}


def pick_family(cfg: ModelConfig) -> str:
    """The Hugging Face family that computes exactly what `cfg` does; UserError with the option in the way if there is none.

    Llama and Qwen3 have biases on all four attention projections or on none, Qwen2 on query, key and value; only the last two know a
    sliding window.
    """
    a = cfg.attention
    sandwich, uneven = cfg.norm.placement != "pre", a.qkv_bias and not a.out_bias
    bias = cfg.ffn.kind == "dense" and cfg.ffn.bias
    refused = {
        f"model.family {cfg.family}": cfg.family != "transformer",
        f"model.ffn.kind {cfg.ffn.kind}": cfg.ffn.kind != "dense",
        f"model.mtp.heads {cfg.mtp.heads}": cfg.mtp.heads > 0,
        "model.norm.kind layer_norm": cfg.norm.kind != "rms_norm",
        "model.ffn.activation gelu": cfg.ffn.activation != "swiglu",
        "model.position.kind learned": cfg.position.kind != "rope",
        "model.attention.window without qk_norm or Qwen2's biases": a.window is not None and (sandwich or not (a.qk_norm or uneven)),
        "model.attention.out_bias without qkv_bias": a.out_bias and not a.qkv_bias,
        "model.attention.qkv_bias with qk_norm and without out_bias": uneven and a.qk_norm,
        "model.ffn.bias with qk_norm": bias and a.qk_norm,
        "model.ffn.bias with attention.qkv_bias and without attention.out_bias": bias and uneven,
        f"model.norm.placement {cfg.norm.placement} with biases or qk_norm": sandwich and (a.qkv_bias or a.qk_norm or bias),
    }
    for option, hit in refused.items():
        if hit:
            raise UserError(f"no Hugging Face family here computes {option}; families: {', '.join(FAMILIES)} (set checkpoint.export: none)")
    if sandwich:
        return "openpangu"
    return "qwen3" if a.qk_norm else "qwen2" if uneven else "llama"


def canonical_names(cfg: ModelConfig) -> list[str]:
    """Every parameter of a model that has a Hugging Face family."""
    a = cfg.attention
    qkv, ffn = ["attention.q_proj", "attention.k_proj", "attention.v_proj"], ["ffn.gate_proj", "ffn.up_proj", "ffn.down_proj"]
    modules = [*qkv, "attention.out_proj", *ffn, "attention_norm", "ffn_norm"]
    modules += ["attention.q_norm", "attention.k_norm"] * a.qk_norm
    modules += ["post_attention_norm", "post_ffn_norm"] * (cfg.norm.placement != "pre")
    biased = qkv * a.qkv_bias + ["attention.out_proj"] * a.out_bias + ffn * cfg.ffn.bias
    inside = [f"{module}.weight" for module in modules] + [f"{module}.bias" for module in biased]
    names = [f"blocks.{layer}.{name}" for layer in range(cfg.layers) for name in inside]
    return ["embedding.weight", "final_norm.weight", *names] + ["head.weight"] * (not cfg.tie_embeddings)


def canonical_shapes(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter of `canonical_names`; vocab_size must be set."""
    d, f, q, kv = cfg.hidden, cfg.ffn.hidden, cfg.attention.heads * cfg.head_dim, cfg.kv_heads * cfg.head_dim
    matrices = {"q_proj": (q, d), "k_proj": (kv, d), "v_proj": (kv, d), "out_proj": (d, q)}
    matrices |= {"gate_proj": (f, d), "up_proj": (f, d), "down_proj": (d, f), "embedding": (cfg.vocab_size, d), "head": (cfg.vocab_size, d)}
    shapes = {}
    for name in canonical_names(cfg):
        *_, module, kind = name.split(".")
        if module in matrices:
            shapes[name] = matrices[module] if kind == "weight" else matrices[module][:1]
        else:
            shapes[name] = (cfg.head_dim,) if module in ("q_norm", "k_norm") else (d,)
    return shapes


def _block_map(family: str) -> dict[str, str]:
    return _BLOCK | (_SANDWICH_NORMS if family == "openpangu" else _NORMS)


def to_hf(name: str, family: str) -> str:
    """Hugging Face name of a canonical parameter, e.g. blocks.0.ffn.up_proj.weight -> model.layers.0.mlp.up_proj.weight."""
    return _rename(name, outside=_OUTSIDE, inside=_block_map(family), pattern=r"blocks\.(\d+)\.(.+)\.(weight|bias)", prefix="model.layers")


def from_hf(name: str, family: str) -> str:
    """Canonical name of a Hugging Face parameter; the inverse of `to_hf`."""
    outside = {hf: mine for mine, hf in _OUTSIDE.items()}
    inside = {hf: mine for mine, hf in _block_map(family).items()}
    return _rename(name, outside=outside, inside=inside, pattern=r"model\.layers\.(\d+)\.(.+)\.(weight|bias)", prefix="blocks")


def _rename(name: str, *, outside: dict[str, str], inside: dict[str, str], pattern: str, prefix: str) -> str:
    if name in outside:
        return outside[name]
    match = re.fullmatch(pattern, name)
    if not match or match[2] not in inside:
        raise UserError(f"parameter {name!r} has no counterpart in the other naming; known modules: {', '.join(inside)}")
    return f"{prefix}.{match[1]}.{inside[match[2]]}.{match[3]}"
