"""Published models with a dense feed-forward branch, as `model` sections."""

from typing import Any


def _llama3(*, layers: int, hidden: int, heads: int, ffn: int) -> dict[str, Any]:
    """Llama 3 of April 2024: 8,192 tokens of context, RoPE base 500,000, untied."""
    return {
        "vocab_size": 128_256,
        "layers": layers,
        "hidden": hidden,
        "max_seq_len": 8192,
        "attention": {"heads": heads, "kv_heads": 8, "head_dim": 128},
        "ffn": {"hidden": ffn},
        "norm": {"eps": 1e-5},
        "position": {"base": 500_000.0},
    }


def _llama31(**shape: int) -> dict[str, Any]:
    """Llama 3.1: the same shapes with RoPE stretched by 8 to 131,072 tokens."""
    scaling = {"kind": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_seq_len": 8192}
    return _llama3(**shape) | {"max_seq_len": 131_072, "position": {"base": 500_000.0, "scaling": scaling}}


def _qwen3(*, layers: int, hidden: int, heads: int, ffn: int, tied: bool) -> dict[str, Any]:
    """Qwen3 (arXiv 2505.09388): heads of 128 whatever the width, RMSNorm on queries and keys."""
    return {
        "vocab_size": 151_936,
        "layers": layers,
        "hidden": hidden,
        "max_seq_len": 40_960,
        "attention": {"heads": heads, "kv_heads": 8, "head_dim": 128, "qk_norm": True},
        "ffn": {"hidden": ffn},
        "norm": {"eps": 1e-6},
        "position": {"base": 1_000_000.0},
        "tie_embeddings": tied,
    }


# arXiv 2504.07866, table 1 and sections 2.2-2.3. The paper does not state eps; 1e-5 is that of the public Pangu Ultra MoE.
PANGU_ULTRA_135B: dict[str, Any] = {
    "vocab_size": 153_376,
    "layers": 94,
    "hidden": 12_288,
    "max_seq_len": 131_072,
    "attention": {"heads": 96, "kv_heads": 8, "head_dim": 128},
    "ffn": {"hidden": 28_672},
    "norm": {"eps": 1e-5, "placement": "depth_scaled_sandwich", "c_attention": 0.283, "c_ffn": 0.432},
    "position": {"base": 10_000.0},
    "init": {"kind": "tiny", "embedding_std": 0.5},
}

SMOLLM2_135M: dict[str, Any] = {
    "vocab_size": 49_152,
    "layers": 30,
    "hidden": 576,
    "max_seq_len": 8192,
    "attention": {"heads": 9, "kv_heads": 3, "head_dim": 64},
    "ffn": {"hidden": 1536},
    "norm": {"eps": 1e-5},
    "position": {"base": 100_000.0},
    "init": {"std": 1 / 24},
    "tie_embeddings": True,
}

_8B, _70B = {"layers": 32, "hidden": 4096, "heads": 32, "ffn": 14_336}, {"layers": 80, "hidden": 8192, "heads": 64, "ffn": 28_672}

DENSE: dict[str, dict[str, Any]] = {
    "pangu_ultra_135b": PANGU_ULTRA_135B,
    "llama3_8b": _llama3(**_8B),
    "llama3_70b": _llama3(**_70B),
    "llama31_8b": _llama31(**_8B),
    "llama31_70b": _llama31(**_70B),
    "qwen3_0_6b": _qwen3(layers=28, hidden=1024, heads=16, ffn=3072, tied=True),
    "qwen3_8b": _qwen3(layers=36, hidden=4096, heads=32, ffn=12_288, tied=False),
    "smollm2_135m": SMOLLM2_135M,
}
