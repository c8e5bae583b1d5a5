"""The closed-form parameter count against the model itself."""

import pytest
import torch

from llmtrain.config.model import ModelConfig
from llmtrain.config.parameters import count_parameters
from llmtrain.config.published import PRESETS
from llmtrain.model import build
from llmtrain.ops import Call, resolve

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
}


def parts_of(model) -> dict[str, int]:
    def count(*words):
        return sum(p.numel() for name, p in model.named_parameters() if any(word in name for word in words))

    return {
        "embedding": count("embedding"),
        "attention": count(".attention."),
        "ffn": count(".ffn."),
        "norms": count("_norm.") - count(".attention.q_norm", ".attention.k_norm"),
        "head": count("head."),
        "total": count(""),
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


def test_pangu_ultra_is_what_the_paper_says():
    total = count_parameters(ModelConfig.model_validate({"preset": "pangu_ultra_135b"}))["total"]
    assert round(total / 1e9, 1) == 133.9  # the paper rounds to 135B


def test_rows_of_logits_follow_the_vocabulary():
    from llmtrain.config.parameters import loss_rows

    assert [loss_rows(vocab, None) for vocab in (256, 4096, 8192, 32_000, 153_376)] == [1024, 1024, 512, 256, 256]
    assert loss_rows(153_376, 100) == 100
