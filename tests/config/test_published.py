"""The published models have exactly the sizes that they were published with."""

import math

import pytest

from llmtrain.config.load import load
from llmtrain.config.mesh_dependent import mesh_dependent
from llmtrain.config.model import ModelConfig
from llmtrain.config.parameters import count_parameters, flops_per_token
from llmtrain.config.published import PRESETS


@pytest.mark.parametrize(
    ("name", "total"),
    [
        ("llama3_8b", 8_030_261_248),
        ("llama3_70b", 70_553_706_496),
        ("qwen3_0_6b", 596_049_920),
        ("qwen3_8b", 8_190_735_360),
        ("smollm2_135m", 134_515_008),
    ],
)
def test_total(name, total):
    assert count_parameters(ModelConfig(preset=name))["total"] == total


def test_pangu_ultra_is_133_9_billion_and_untied():
    model = ModelConfig(preset="pangu_ultra_135b")
    counts = count_parameters(model)
    assert round(counts["total"] / 1e9, 1) == 133.9
    assert round((counts["total"] - counts["head"]) / 1e9, 1) == 132.0  # what tied embeddings would give
    assert counts["norms"] == (4 * 94 + 1) * 12_288


def test_pangu_ultra_norms_and_init_are_the_papers():
    model = ModelConfig(preset="pangu_ultra_135b")
    assert model.norm.placement == "depth_scaled_sandwich" and model.init.kind == "tiny"
    assert math.isclose(model.norm.c_attention / math.sqrt(model.layers), 0.02919, rel_tol=1e-3)
    assert math.isclose(model.norm.c_ffn / math.sqrt(model.layers), 0.04456, rel_tol=1e-3)


@pytest.mark.parametrize("name", PRESETS)
def test_parts_sum_to_the_total(name):
    counts = count_parameters(ModelConfig(preset=name))
    assert sum(counts[k] for k in ("embedding", "attention", "ffn", "norms", "head")) == counts["total"]
    assert counts["without embeddings"] == counts["attention"] + counts["ffn"] + counts["norms"]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"attention": {"heads": 4, "kv_heads": 2, "qkv_bias": True, "out_bias": True, "qk_norm": True}},
        {"ffn": {"hidden": 96, "activation": "gelu", "bias": True}, "norm": {"kind": "layer_norm"}, "position": {"kind": "learned"}},
        {"norm": {"placement": "sandwich"}, "tie_embeddings": True},
    ],
)
def test_count_is_that_of_the_built_model(options):
    torch = pytest.importorskip("torch")
    family = pytest.importorskip("llmtrain.model.family")
    model = ModelConfig(**{"layers": 3, "hidden": 64, "vocab_size": 100, "max_seq_len": 32, "attention": {"heads": 4}} | options)
    with torch.device("meta"):
        built = family.build(model, None, 16)
    assert count_parameters(model)["total"] == sum(p.numel() for p in built.parameters())


def test_flops_conventions():
    model = ModelConfig(vocab_size=50, layers=2, hidden=16, attention={"heads": 2}, ffn={"hidden": 32}, tie_embeddings=True)
    weights = 2 * (4 * 16 * 16 + 3 * 16 * 32) + 50 * 16
    assert flops_per_token(model, 8, causal=False) == 6 * weights + 12 * 2 * 16 * 8
    assert flops_per_token(model, 8, causal=True) == 6 * weights + 12 * 2 * 16 * 4.5
    windowed = model.model_copy(update={"attention": model.attention.model_copy(update={"window": 2})})
    assert flops_per_token(windowed, 8) == 6 * weights + 12 * 2 * 16 * (1 + 7 * 2) / 8


def test_sixteen_bit_sums_are_labelled():
    assert mesh_dependent(load(None, []).run) == {}
    assert list(mesh_dependent(load(None, ["--precision.reduce", "bf16"]).run)) == ["precision.reduce"]
