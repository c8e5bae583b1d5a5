"""The shape of a model that a published row names: what the row says of it, and the rest from the model's public configuration."""

import re
from collections.abc import Mapping
from typing import Any

from llmtrain.config.model import ModelConfig
from llmtrain.config.published import PRESETS
from llmtrain.errors import UserError

Row = Mapping[str, str]


def _llama_like(layers: int, hidden: int, ffn: int, *, tied: bool) -> dict[str, Any]:
    """nanotron's benchmark names parameters alone. Llama 3's widths with as many key as query heads and 131,072 words give exactly its
    1.34, 3.57, 8.86 and 80.0 billion; no other choice of the public shapes does."""
    return {
        "vocab_size": 131_072,
        "layers": layers,
        "hidden": hidden,
        "attention": {"heads": hidden // 128},
        "ffn": {"hidden": ffn},
        "tie_embeddings": tied,
    }


def _gpt(layers: int, hidden: int, heads: int, vocab: int = 51_200, kv: int | None = None) -> dict[str, Any]:
    return {
        "vocab_size": vocab,
        "layers": layers,
        "hidden": hidden,
        "attention": {"heads": heads, "kv_heads": kv or heads},
        "ffn": {"hidden": 4 * hidden, "activation": "gelu"},
        "norm": {"kind": "layer_norm"},
    }


def _gated(vocab: int, layers: int, hidden: int, heads: int, ffn: int, kv: int | None = None) -> dict[str, Any]:
    attention = {"heads": heads, "kv_heads": kv or heads}
    return {"vocab_size": vocab, "layers": layers, "hidden": hidden, "attention": attention, "ffn": {"hidden": ffn}}


def _experts(layers: int, hidden: int, heads: int, kv: int, vocab: int, /, head_dim: int | None = None, **ffn: Any) -> dict[str, Any]:
    attention = {"heads": heads, "kv_heads": kv} | ({"head_dim": head_dim} if head_dim else {})
    return {"vocab_size": vocab, "layers": layers, "hidden": hidden, "attention": attention, "ffn": {"kind": "moe", **ffn}}


_LATENT = {"kind": "mla", "query_rank": 1536, "kv_rank": 512, "nope_dim": 128, "rope_dim": 64, "value_dim": 128}
_LLAMA31_405B = {
    **PRESETS["llama31_70b"],
    "layers": 126,
    "hidden": 16_384,
    "attention": {"heads": 128, "kv_heads": 8},
    "ffn": {"hidden": 53_248},
}

# The first pattern found in the row's model, in lower case without `-` and `_`, gives what the row itself does not say.
SHAPES: list[tuple[str, dict[str, Any]]] = [
    (r"llamalike1\.34b", _llama_like(16, 2048, 8192, tied=True)),
    (r"llamalike3\.57b", _llama_like(28, 3072, 8192, tied=True)),
    (r"llamalike8\.86b", _llama_like(32, 4096, 14_336, tied=False)),
    (r"llamalike80\.0b", _llama_like(80, 8192, 28_672, tied=False)),
    (r"llama3(\.\d)?(?=70b)", PRESETS["llama31_70b"]),
    (r"llama3(\.\d)?(?=405b)", _LLAMA31_405B),
    (r"llama3", PRESETS["llama31_8b"]),
    (r"llama2?(?=70b)", _gated(32_000, 80, 8192, 64, 28_672, 8)),
    (r"llama2?(?=13b)", _gated(32_000, 40, 5120, 40, 13_824)),
    (r"llama", _gated(32_000, 32, 4096, 32, 11_008)),
    (r"chatglm", _gated(65_024, 28, 4096, 32, 13_696, 2)),
    (r"mixtral8x22b", _experts(56, 6144, 48, 8, 32_768, experts=8, top_k=2, hidden=16_384)),
    (r"mixtral", PRESETS["mixtral_8x7b"]),
    (r"gptoss120b", _experts(36, 2880, 64, 8, 201_088, head_dim=64, experts=128, top_k=4, hidden=2880)),
    (r"gptoss20b", _experts(24, 2880, 64, 8, 201_088, head_dim=64, experts=32, top_k=4, hidden=2880)),
    (r"qwen330b", PRESETS["qwen3_30b_a3b"]),
    (r"qwen3235b", _experts(94, 4096, 64, 4, 151_936, head_dim=128, experts=128, top_k=8, hidden=1536)),
    (r"qwen257b", _experts(28, 3584, 28, 4, 151_936, experts=64, top_k=8, hidden=2560, shared_experts=8)),
    (r"deepseekv2", {
        "vocab_size": 102_400, "layers": 60, "hidden": 5120, "attention": {**_LATENT, "heads": 128},
        "ffn": {"kind": "moe", "experts": 160, "top_k": 6, "hidden": 1536, "shared_experts": 2, "dense_layers": 1, "dense_hidden": 12_288},
    }),
    (r"deepseekv3", {**PRESETS["deepseek_v3"], "mtp": {"heads": 1}}),
    (r"kimik2", {**PRESETS["deepseek_v3"], "vocab_size": 163_840, "attention": {**_LATENT, "heads": 64},
        "ffn": {"kind": "moe", "experts": 384, "top_k": 8, "hidden": 2048, "shared_experts": 1, "dense_layers": 1,
                "dense_hidden": 18_432}}),
    (r"deepseek500b", _experts(4, 4096, 32, 4, 102_400, experts=40, top_k=5, hidden=4096)),
    (r"panguultramoe", {**PRESETS["pangu_ultra_moe_718b"], "mtp": {"heads": 1}}),
    (r"panguultra", PRESETS["pangu_ultra_135b"]),
    (r"nemotron4?340b", _gpt(96, 18_432, 96, 256_000, 8)),
    (r"nemotron4?15b", _gpt(32, 6144, 48, 256_000, 8)),
    (r"gpt3175b|gpt3xl175b|175bgpt", _gpt(96, 12_288, 96)),
]  # fmt: skip


def idle_layers(row: Row) -> tuple[int, ...]:
    """Numbers of the blocks that compute nothing: MindSpeed-LLM fills its stages up with them (`noop-layers`)."""
    found = re.search(r"noop-layers ([\d,]+)", row["notes"])
    return tuple(map(int, found[1].split(","))) if found else ()


UNKNOWN = re.compile(r"mamba|nemotronh|hybrid|vision|vl\b", re.IGNORECASE)


def model_of(row: Row) -> ModelConfig:
    """The model of a row. Raises UserError where what the row says and the public shapes do not make a transformer."""
    name = row["model"].lower().replace("-", "").replace("_", "").replace(" ", "")
    if UNKNOWN.search(row["model"]):
        raise UserError(f"{row['model']}: not a transformer of this package")
    known = next((shape for pattern, shape in SHAPES if re.search(pattern, name)), None)
    values = dict(known or {})
    for column, field in (("layers", "layers"), ("hidden", "hidden"), ("vocab", "vocab_size")):
        if row[column]:
            values[field] = int(row[column])
    if (idle := idle_layers(row)) and "layers" in values:
        values["layers"] -= len(idle)
    if "layers" not in values or "hidden" not in values:
        raise UserError(f"{row['model']}: its layers and width are not known")
    values["attention"], values["ffn"] = _attention(row, values), _branch(row, values)
    values.setdefault("vocab_size", 51_200)
    if values["ffn"].get("activation") == "gelu":
        values.setdefault("norm", {"kind": "layer_norm"})
    values["max_seq_len"] = max(int(values.get("max_seq_len", 0)), int(row["seq"] or 2048))
    return ModelConfig.model_validate(values)


def _attention(row: Row, values: dict[str, Any]) -> dict[str, Any]:
    found = dict(values.get("attention", {}))
    if row["heads"]:
        if int(row["heads"]) != found.get("heads"):
            found.pop("head_dim", None)
            found.pop("kv_heads", None)
        found["heads"] = int(row["heads"])
    if row["kv_heads"] and found.get("kind") != "mla":
        found["kv_heads"] = int(row["kv_heads"])
    if not found:
        raise UserError(f"{row['model']}: its attention heads are not known")
    if found.get("kind") != "mla" and "head_dim" not in found and values["hidden"] % found["heads"]:
        found["head_dim"] = 128
    return found


def _branch(row: Row, values: dict[str, Any]) -> dict[str, Any]:
    found = dict(values.get("ffn", {}))
    if row["experts"]:
        width = row["moe_ffn"] or found.get("hidden") or row["ffn"]
        found = {**found, "kind": "moe", "experts": int(row["experts"]), "top_k": int(row["topk"] or 2), "hidden": int(width)}
        found["dense_layers"] = min(int(row.get("dense_layers") or found.get("dense_layers", 0)), values["layers"] - 1)
        if "router" in found and found["experts"] % found["router"].get("groups", 1):
            found.pop("router")
    elif row["ffn"]:
        found = {**found, "hidden": int(row["ffn"])}
        if row["glu"] == "0":
            found["activation"] = "gelu"
    elif found.get("kind") == "moe":
        found["dense_layers"] = min(found.get("dense_layers", 0), values["layers"] - 1)
    if "hidden" not in found:
        found = {"hidden": 4 * values["hidden"], "activation": "gelu"}
    return found
