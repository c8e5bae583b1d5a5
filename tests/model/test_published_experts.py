"""The published mixtures of experts against transformers' models, built from the values of their own config.json."""

import pytest
import torch

from llmtrain.config.model import ModelConfig
from llmtrain.config.parameters import count_parameters
from llmtrain.config.published import PRESETS
from llmtrain.model.rope import attention_factor, inverse_frequencies

transformers = pytest.importorskip("transformers")

# deepseek-ai/DeepSeek-V3, mistralai/Mixtral-8x7B-v0.1, Qwen/Qwen3-30B-A3B: what sets shapes, router and RoPE.
DEEPSEEK_V3 = {
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_nextn_predict_layers": 1,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "n_shared_experts": 1,
    "n_routed_experts": 256,
    "routed_scaling_factor": 2.5,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "qk_nope_head_dim": 128,
    "n_group": 8,
    "topk_group": 4,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 3,
    "norm_topk_prob": True,
    "max_position_embeddings": 163840,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "rope_scaling": {
        "type": "yarn",
        "factor": 40,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
    "attention_bias": False,
    "tie_word_embeddings": False,
}
MIXTRAL = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
}
QWEN3_MOE = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
}
PUBLISHED = {
    "deepseek_v3": ("DeepseekV3", DEEPSEEK_V3),
    "mixtral_8x7b": ("Mixtral", MIXTRAL),
    "qwen3_30b_a3b": ("Qwen3Moe", QWEN3_MOE),
}


@pytest.fixture(scope="module")
def theirs():
    def build(name: str):
        family, values = PUBLISHED[name]
        with torch.device("meta"):
            return getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**values))

    return {name: build(name) for name in PUBLISHED}


@pytest.mark.parametrize("name", PUBLISHED)
def test_as_many_parameters_as_theirs(theirs, name):
    """Theirs has no heads of multi-token prediction unless asked, and ours counts no bias of a router, a buffer in both."""
    counts, built = count_parameters(ModelConfig(preset=name)), dict(theirs[name].named_parameters())
    assert counts["total"] == sum(p.numel() for p in built.values())
    assert counts["attention"] == sum(p.numel() for key, p in built.items() if ".self_attn." in key)
    assert counts["ffn"] == sum(p.numel() for key, p in built.items() if ".mlp." in key)


@pytest.mark.parametrize("name", PUBLISHED)
def test_rotation_and_scores_scale_alike(theirs, name):
    """DeepSeek-V3's YaRN leaves cos and sin as they are and multiplies scores by (0.1 ln 40 + 1)^2."""
    model, rotation = ModelConfig(preset=name), theirs[name].model.rotary_emb
    with torch.device("cpu"):
        their_frequencies, factor = type(rotation)(theirs[name].config).inv_freq, rotation.attention_scaling
    ours = inverse_frequencies(model.position.base, model.rope_dim, model.position.scaling)
    torch.testing.assert_close(ours.float(), their_frequencies, rtol=1e-5, atol=0)
    assert attention_factor(model.position.scaling) == factor == 1.0
    scale = getattr(model.attention, "softmax_scale", None) or model.head_dim**-0.5
    assert scale == pytest.approx(theirs[name].model.layers[-1].self_attn.scaling, rel=1e-12)


def test_what_a_token_needs():
    """arXiv 2412.19437 says 671 B and 37 B (both tables counted), 2401.04088 47 B and 13 B, 2505.09388 30.5 B and 3.3 B."""
    found = {name: count_parameters(ModelConfig(preset=name)) for name in PUBLISHED}
    billions = {name: (round(counts["total"] / 1e9, 1), round(counts["active"] / 1e9, 2)) for name, counts in found.items()}
    assert billions == {"deepseek_v3": (671.0, 37.55), "mixtral_8x7b": (46.7, 12.88), "qwen3_30b_a3b": (30.5, 3.35)}


def test_presets_are_not_changed_by_who_uses_them():
    assert PRESETS["pangu_ultra_moe_718b"]["ffn"]["router"] == {"score": "sigmoid", "renormalise": True, "scale": 2.5}
    assert ModelConfig(preset="pangu_ultra_moe_718b").ffn.router.groups == 1
