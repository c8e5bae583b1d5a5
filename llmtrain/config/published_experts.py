"""Published mixtures of experts, as `model` sections: what their checkpoints need. Losses that balance experts are the recipe's."""

import math
from typing import Any


def _latent(*, heads: int, scale: float | None = None) -> dict[str, Any]:
    """Multi-head latent attention with the widths that DeepSeek-V3 and Pangu Ultra MoE share."""
    widths = {"query_rank": 1536, "kv_rank": 512, "nope_dim": 128, "rope_dim": 64, "value_dim": 128}
    return {"kind": "mla", "heads": heads} | widths | ({} if scale is None else {"softmax_scale": scale})


def _fine_grained(**router: Any) -> dict[str, Any]:
    """256 experts and a shared one of width 2,048 behind three dense layers, as in DeepSeek-V3 and Pangu Ultra MoE."""
    counts = {"experts": 256, "top_k": 8, "hidden": 2048, "shared_experts": 1, "dense_layers": 3, "dense_hidden": 18_432}
    return {"kind": "moe"} | counts | {"router": {"score": "sigmoid", "renormalise": True, "scale": 2.5} | router}


# arXiv 2505.04519, and config.json and modeling code of openPangu-Ultra-MoE-718B. The constants of its norms are not published: `auto`
# measures them. The published 718 B leave out the layer of multi-token prediction; `mtp: {heads: 1}` adds it.
PANGU_ULTRA_MOE_718B: dict[str, Any] = {
    "vocab_size": 153_600,
    "layers": 61,
    "hidden": 7680,
    "max_seq_len": 131_072,
    "attention": _latent(heads=128),
    "ffn": _fine_grained(),
    "norm": {"eps": 1e-5, "placement": "depth_scaled_sandwich", "c_attention": "auto", "c_ffn": "auto"},
    "position": {"base": 25_600_000.0},
    "init": {"kind": "tiny"},
}

YARN_FACTOR = 40.0
# config.json of deepseek-ai/DeepSeek-V3 and arXiv 2412.19437; the published 671 B leave out multi-token prediction. `mscale` and
# `mscale_all_dim` of its YaRN are both 1: cos and sin keep their length, and its modeling code multiplies scores by
# (0.1 ln(factor) + 1)^2 instead. The bias moved by 0.001 a step for the first 14.3 T tokens (section 4.2).
DEEPSEEK_V3: dict[str, Any] = {
    "vocab_size": 129_280,
    "layers": 61,
    "hidden": 7168,
    "max_seq_len": 163_840,
    "attention": _latent(heads=128, scale=(0.1 * math.log(YARN_FACTOR) + 1) ** 2 / math.sqrt(128 + 64)),
    "ffn": _fine_grained(groups=8, top_groups=4, bias_rate=0.001),
    "norm": {"eps": 1e-6},
    "position": {
        "base": 10_000.0,
        "scaling": {"kind": "yarn", "factor": YARN_FACTOR, "original_seq_len": 4096, "attention_factor": 1.0},
    },
}

# config.json of mistralai/Mixtral-8x7B-v0.1 and arXiv 2401.04088.
MIXTRAL_8X7B: dict[str, Any] = {
    "vocab_size": 32_000,
    "layers": 32,
    "hidden": 4096,
    "max_seq_len": 32_768,
    "attention": {"heads": 32, "kv_heads": 8, "head_dim": 128},
    "ffn": {"kind": "moe", "experts": 8, "top_k": 2, "hidden": 14_336},
    "norm": {"eps": 1e-5},
    "position": {"base": 1_000_000.0},
}

# config.json of Qwen/Qwen3-30B-A3B and arXiv 2505.09388.
QWEN3_30B_A3B: dict[str, Any] = {
    "vocab_size": 151_936,
    "layers": 48,
    "hidden": 2048,
    "max_seq_len": 40_960,
    "attention": {"heads": 32, "kv_heads": 4, "head_dim": 128, "qk_norm": True},
    "ffn": {"kind": "moe", "experts": 128, "top_k": 8, "hidden": 768},
    "norm": {"eps": 1e-6},
    "position": {"base": 1_000_000.0},
}


def _gpt3_xl(**ffn: int) -> dict[str, Any]:
    """GPT3-XL with 64 experts, as BigMac compares it (arXiv 2502.16927); its count of parameters has one table for embedding and head."""
    return {
        "vocab_size": 50_257,
        "layers": 24,
        "hidden": 2048,
        "max_seq_len": 2048,
        "attention": {"heads": 16, "qkv_bias": True, "out_bias": True},
        "ffn": {"kind": "moe", "experts": 64, "top_k": 8, "activation": "gelu", "bias": True} | ffn,
        "norm": {"kind": "layer_norm"},
        "position": {"kind": "learned"},
        "tie_embeddings": True,
    }


EXPERTS: dict[str, dict[str, Any]] = {
    "pangu_ultra_moe_718b": PANGU_ULTRA_MOE_718B,
    "deepseek_v3": DEEPSEEK_V3,
    "mixtral_8x7b": MIXTRAL_8X7B,
    "qwen3_30b_a3b": QWEN3_30B_A3B,
    "gpt3_xl_fine_grained": _gpt3_xl(hidden=512),
    "gpt3_xl_bigmac": _gpt3_xl(hidden=2048, descend=512),
}
