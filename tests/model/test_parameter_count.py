"""The closed-form parameter count against the model itself."""

import pytest
import torch

from llmtrain.config.model import ModelConfig
from llmtrain.config.parameters import count_parameters
from llmtrain.config.published import PRESETS
from llmtrain.model import build
from llmtrain.ops import Call, resolve

LATENT = {"kind": "mla", "heads": 4, "query_rank": 20, "kv_rank": 14, "nope_dim": 10, "rope_dim": 6, "value_dim": 9}
EXPERTS = {"kind": "moe", "experts": 6, "top_k": 2, "hidden": 18}
SHARED = {"shared_experts": 2, "dense_layers": 1, "dense_hidden": 50}
OPTIONS = {
    "pre": {},
    "tied sandwich": {"tie_embeddings": True, "norm": {"placement": "sandwich"}},
    "gpt": {
        "attention": {"heads": 4, "qkv_bias": True, "out_bias": True},
        "ffn": {"hidden": 50, "activation": "gelu", "bias": True},
        "norm": {"kind": "layer_norm", "placement": "depth_scaled_sandwich"},
        "position": {"kind": "learned"},
    },
    "qwen-like": {"attention": {"heads": 4, "kv_heads": 2, "head_dim": 20, "qk_norm": True, "qkv_bias": True}},
    "swiglu bias": {"attention": {"heads": 4, "kv_heads": 1}, "ffn": {"hidden": 50, "bias": True}},
    "latent": {"attention": LATENT, "norm": {"kind": "layer_norm"}},
    "latent, queries straight": {"attention": LATENT | {"query_rank": None}, "mtp": {"heads": 2}},
    "experts": {"ffn": EXPERTS, "mtp": {"heads": 1}},
    "experts, biases": {"ffn": EXPERTS | {"bias": True, "activation": "gelu"}},
    "shared experts after dense layers": {"ffn": EXPERTS | SHARED, "attention": LATENT, "mtp": {"heads": 2}},
    "shared experts, biases": {"ffn": EXPERTS | SHARED | {"bias": True, "dense_hidden": None}, "norm": {"placement": "sandwich"}},
    "dense layers alone": {"ffn": EXPERTS | SHARED | {"dense_layers": 3}},
    "bigmac": {"ffn": EXPERTS | {"descend": 12}, "mtp": {"heads": 1}},
    "bigmac, biases, shared": {"ffn": EXPERTS | SHARED | {"descend": 12, "bias": True, "activation": "gelu"}},
    "router with a bias": {"ffn": EXPERTS | {"router": {"score": "sigmoid", "bias_rate": 0.001, "groups": 3, "top_groups": 2}}},
}


def parts_of(model) -> dict[str, int]:
    def count(*words, ahead=False):
        named = ((name, p) for name, p in model.named_parameters() if name.startswith("mtp.") == ahead)
        return sum(p.numel() for name, p in named if any(word in name for word in words))

    return {
        "embedding": count("embedding"),
        "attention": count(".attention."),
        "ffn": count(".ffn."),
        "norms": count("_norm.") - count(".attention.q_norm", ".attention.k_norm", ".attention.kv_norm"),
        "head": count("head."),
        "mtp": count("", ahead=True),
        "total": count("") + count("", ahead=True),
    }


def on_meta(cfg: ModelConfig):
    with torch.device("meta"):
        return build(cfg, resolve({}, Call(device="cpu", dtype=torch.float32)), 64)


@pytest.mark.parametrize("preset", PRESETS)
def test_of_every_preset(preset):
    cfg = ModelConfig.model_validate({"preset": preset})
    expected = count_parameters(cfg)
    assert parts_of(on_meta(cfg)).items() <= expected.items()
    assert expected["without embeddings"] == expected["attention"] + expected["ffn"] + expected["norms"]


@pytest.mark.parametrize("case", OPTIONS)
def test_of_option_combinations(case):
    cfg = ModelConfig.model_validate({"vocab_size": 101, "layers": 3, "hidden": 48, "attention": {"heads": 4}, **OPTIONS[case]})
    assert parts_of(on_meta(cfg)).items() <= count_parameters(cfg).items()


@pytest.mark.parametrize("case", OPTIONS)
def test_active_parameters_are_those_of_a_model_with_as_many_experts_as_a_token_goes_to(case):
    """But for the rows of the router, which a token sees all of."""
    cfg = ModelConfig.model_validate({"vocab_size": 101, "layers": 3, "hidden": 48, "attention": {"heads": 4}, **OPTIONS[case]})
    if cfg.ffn.kind == "dense":
        assert count_parameters(cfg)["active"] == count_parameters(cfg)["total"]
        return
    few = cfg.model_copy(update={"ffn": cfg.ffn.model_copy(update={"experts": cfg.ffn.top_k})})
    routers = (cfg.expert_layers + cfg.mtp.heads) * (cfg.ffn.experts - cfg.ffn.top_k) * cfg.hidden
    assert count_parameters(cfg)["active"] == parts_of(on_meta(few))["total"] + routers


def test_pangu_ultra_moe_is_what_the_paper_says():
    counts = count_parameters(ModelConfig.model_validate({"preset": "pangu_ultra_moe_718b"}))
    assert round(counts["total"] / 1e9, 1) == 719.1 and round((counts["active"] - counts["embedding"]) / 1e9, 1) == 39.2
    ahead = count_parameters(ModelConfig.model_validate({"preset": "pangu_ultra_moe_718b", "mtp": {"heads": 1}}))
    assert round(ahead["mtp"] / 1e9, 1) == 12.4 and ahead["total"] == counts["total"] + ahead["mtp"]


def test_pangu_ultra_is_what_the_paper_says():
    total = count_parameters(ModelConfig.model_validate({"preset": "pangu_ultra_135b"}))["total"]
    assert round(total / 1e9, 1) == 133.9  # the paper rounds to 135B


def test_rows_of_logits_follow_the_vocabulary():
    from llmtrain.config.parameters import loss_rows

    assert [loss_rows(vocab, None) for vocab in (256, 4096, 8192, 32_000, 153_376)] == [1024, 1024, 512, 256, 256]
    assert loss_rows(153_376, 100) == 100
