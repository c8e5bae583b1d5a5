"""The config.json that makes a Hugging Face model compute what ours does."""

from llmtrain.config.model import ModelConfig

# openPangu's dense class; vLLM has one of the same name. transformers knows neither, and must not take the folder for a Llama.
_ARCHITECTURE = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "openpangu": "PanguEmbeddedForCausalLM",
}
_MODEL_TYPE = {"openpangu": "PanguEmbedded"}


def hf_config(cfg: ModelConfig, family: str, *, dtype: str = "float32", rope_base: float | None = None) -> dict:
    """config.json of `cfg` as a model of `family` (see names.pick_family).

    `dtype` is that of the weights, `rope_base` the base in use if not `model.position.base`. Token ids are the caller's to set.
    """
    base = _plain_base(cfg, rope_base or cfg.position.base)
    values = {
        "architectures": [_ARCHITECTURE[family]],
        "model_type": _MODEL_TYPE.get(family, family),
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.hidden,
        "intermediate_size": cfg.ffn.hidden,
        "num_hidden_layers": cfg.layers,
        "num_attention_heads": cfg.attention.heads,
        "num_key_value_heads": cfg.kv_heads,
        "head_dim": cfg.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": _longest(cfg),
        "rms_norm_eps": cfg.norm.eps,
        "rope_theta": base,
        "rope_parameters": {"rope_theta": base} | rope_scaling(cfg),
        # Releases of transformers before 5 and most inference engines read the scaling here.
        "rope_scaling": rope_scaling(cfg) if cfg.position.scaling is not None and cfg.position.scaling.kind != "ntk" else None,
        "tie_word_embeddings": cfg.tie_embeddings,
        "attention_bias": cfg.attention.out_bias,  # Llama's and Qwen3's flag covers all four projections
        "mlp_bias": cfg.ffn.bias,
        "torch_dtype": dtype,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if cfg.attention.window is not None:
        layers = ["sliding_attention"] * cfg.layers
        values |= {"use_sliding_window": True, "sliding_window": cfg.attention.window, "max_window_layers": 0, "layer_types": layers}
    if family == "openpangu":
        # openPangu's configuration class takes `bias` (of all attention projections) to be true when the file does not say.
        values |= {"sandwich_norm": True, "bias": False}
    return values


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
        return values if scaling.attention_factor is None else values | {"attention_factor": scaling.attention_factor}
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_seq_len,
    }


def _plain_base(cfg: ModelConfig, base: float) -> float:
    """NTK scaling is nothing but a larger base, so it is written as one."""
    scaling = cfg.position.scaling
    return base * scaling.factor ** (cfg.head_dim / (cfg.head_dim - 2)) if scaling is not None and scaling.kind == "ntk" else base


def _longest(cfg: ModelConfig) -> int:
    """Some releases take YaRN's factor to be this over the original length, so the two must agree."""
    scaling = cfg.position.scaling
    return round(scaling.factor * scaling.original_seq_len) if scaling is not None and scaling.kind == "yarn" else cfg.max_seq_len
