"""The config.json that makes a Hugging Face model compute what ours does."""

from typing import Any

from llmtrain.config.model import ModelConfig
from llmtrain.convert.rope_read import magnitude

# openPangu's dense class; vLLM has one of the same name. transformers knows neither, and must not take the folder for a Llama.
_ARCHITECTURE = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "openpangu": "PanguEmbeddedForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
}
_MODEL_TYPE = {"openpangu": "PanguEmbedded"}


def hf_config(cfg: ModelConfig, family: str, *, dtype: str = "float32", rope_base: float | None = None) -> dict:
    """config.json of `cfg` as a model of `family` (see families.pick_family).

    `dtype` is that of the weights, `rope_base` the base in use if not `model.position.base`. Token ids are the caller's to set.
    """
    base = _plain_base(cfg, rope_base or cfg.position.base)
    values = {
        "architectures": [_ARCHITECTURE[family]],
        "model_type": _MODEL_TYPE.get(family, family),
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.hidden,
        "intermediate_size": cfg.of_block(0).ffn.hidden,  # of a mixture of experts that of its dense layers
        "num_hidden_layers": cfg.layers,
        "num_attention_heads": cfg.attention.heads,
        "num_key_value_heads": cfg.kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": _longest(cfg),
        "rms_norm_eps": cfg.norm.eps,
        "rope_theta": base,
        "rope_parameters": {"rope_theta": base} | rope_scaling(cfg),
        # Releases of transformers before 5 and most inference engines read the scaling here.
        "rope_scaling": rope_scaling(cfg) if cfg.position.scaling is not None and cfg.position.scaling.kind != "ntk" else None,
        "tie_word_embeddings": cfg.tie_embeddings,
        "torch_dtype": dtype,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    values |= _latent(cfg) if cfg.attention.kind == "mla" else _grouped(cfg)
    if cfg.ffn.kind == "moe":
        values |= _EXPERTS[family](cfg)
    if family == "openpangu":
        # openPangu's configuration class takes `bias` (of all attention projections) to be true when the file does not say.
        values |= {"sandwich_norm": True, "bias": False}
    return values


def _grouped(cfg: ModelConfig) -> dict[str, Any]:
    # The flag of Llama and Qwen3 covers all four projections.
    values = {"head_dim": cfg.head_dim, "attention_bias": cfg.attention.out_bias, "mlp_bias": cfg.ffn.bias}
    if cfg.attention.window is None:
        return values
    layers = ["sliding_attention"] * cfg.layers
    return values | {"use_sliding_window": True, "sliding_window": cfg.attention.window, "max_window_layers": 0, "layer_types": layers}


def _latent(cfg: ModelConfig) -> dict[str, Any]:
    a = cfg.attention
    return {
        "q_lora_rank": a.query_rank,
        "kv_lora_rank": a.kv_rank,
        "qk_nope_head_dim": a.nope_dim,
        "qk_rope_head_dim": a.rope_dim,
        "v_head_dim": a.value_dim,
        "attention_bias": False,
        "rope_interleave": True,
        "num_nextn_predict_layers": 0,
        "first_k_dense_replace": cfg.layers - cfg.expert_layers,
    }


def _mixtral(cfg: ModelConfig) -> dict[str, Any]:
    return {"num_local_experts": cfg.ffn.experts, "num_experts_per_tok": cfg.ffn.top_k, "sliding_window": cfg.attention.window}


def _qwen3_moe(cfg: ModelConfig) -> dict[str, Any]:
    ffn = cfg.ffn
    return {
        "num_experts": ffn.experts,
        "num_experts_per_tok": ffn.top_k,
        "moe_intermediate_size": ffn.hidden,
        "norm_topk_prob": ffn.router.renormalise,
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(range(ffn.dense_layers)),
    }


def _deepseek_v3(cfg: ModelConfig) -> dict[str, Any]:
    ffn, router = cfg.ffn, cfg.ffn.router
    return {
        "n_routed_experts": ffn.experts,
        "num_experts_per_tok": ffn.top_k,
        "moe_intermediate_size": ffn.hidden,
        "n_shared_experts": ffn.shared_experts,
        "moe_layer_freq": 1,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "norm_topk_prob": router.renormalise,
        "routed_scaling_factor": router.scale,
        "n_group": router.groups,
        "topk_group": router.top_groups,
    }


_EXPERTS = {"mixtral": _mixtral, "qwen3_moe": _qwen3_moe, "deepseek_v3": _deepseek_v3}


def rope_scaling(cfg: ModelConfig) -> dict:
    """The rope part of config.json beside the base."""
    scaling = cfg.position.scaling
    if scaling is None or scaling.kind == "ntk":
        return {"rope_type": "default"}
    if scaling.kind == "yarn":
        values = {
            "rope_type": "yarn",
            "factor": scaling.factor,
            "original_max_position_embeddings": scaling.original_seq_len,
            "beta_fast": scaling.beta_fast,
            "beta_slow": scaling.beta_slow,
        }
        values |= {} if scaling.attention_factor is None else {"attention_factor": scaling.attention_factor}
        return values | _magnitudes(cfg)
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_seq_len,
    }


def _magnitudes(cfg: ModelConfig) -> dict[str, float]:
    """What makes DeepSeek-V3 multiply scores by `attention.softmax_scale`, the inverse of rope_read.latent_scale. The factor of cos and
    sin, where it is given, is said in the same way for readers that do not know `attention_factor`."""
    if cfg.attention.kind != "mla" or cfg.attention.softmax_scale is None:
        return {}
    scaling, whole = cfg.position.scaling, (cfg.attention.softmax_scale * cfg.head_dim**0.5) ** 0.5

    def over(magnified: float) -> float:  # rounded, so that a file's own numbers come back
        return round((magnified - 1) / (magnitude(scaling.factor, 1.0) - 1), 12)

    rotated = {} if scaling.attention_factor is None else {"mscale": over(scaling.attention_factor * whole)}
    return rotated | {"mscale_all_dim": over(whole)}


def _plain_base(cfg: ModelConfig, base: float) -> float:
    """NTK scaling is nothing but a larger base, so it is written as one."""
    scaling = cfg.position.scaling
    return base * scaling.factor ** (cfg.rope_dim / (cfg.rope_dim - 2)) if scaling is not None and scaling.kind == "ntk" else base


def _longest(cfg: ModelConfig) -> int:
    """Some releases take YaRN's factor to be this over the original length, so the two must agree."""
    scaling = cfg.position.scaling
    return round(scaling.factor * scaling.original_seq_len) if scaling is not None and scaling.kind == "yarn" else cfg.max_seq_len
