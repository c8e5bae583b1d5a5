"""The config.json that makes a Hugging Face model compute what ours does."""

from llmtrain.config.model import ModelConfig

_ARCHITECTURE = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "openpangu": "PanguForCausalLM"}


def hf_config(cfg: ModelConfig, family: str, *, dtype: str = "float32", bos: int | None = None, eos: int | None = None) -> dict:
    """config.json of `cfg` as a model of `family` (see names.pick_family)."""
    values = {
        "architectures": [_ARCHITECTURE[family]],
        "model_type": family,
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.hidden,
        "intermediate_size": cfg.ffn.hidden,
        "num_hidden_layers": cfg.layers,
        "num_attention_heads": cfg.attention.heads,
        "num_key_value_heads": cfg.kv_heads,
        "head_dim": cfg.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": cfg.max_seq_len,
        "rms_norm_eps": cfg.norm.eps,
        "rope_theta": cfg.position.base,
        "rope_parameters": {"rope_theta": cfg.position.base} | rope_scaling(cfg),
        "tie_word_embeddings": cfg.tie_embeddings,
        "attention_bias": cfg.attention.qkv_bias,
        "torch_dtype": dtype,
        "bos_token_id": bos,
        "eos_token_id": eos,
    }
    if family == "openpangu":
        values |= {"sandwich_norm": True}
    return values


def rope_scaling(cfg: ModelConfig) -> dict:
    """The rope part of config.json beside the base."""
    scaling = cfg.position.scaling
    if scaling is None:
        return {"rope_type": "default"}
    if scaling.kind == "yarn":
        return {
            "rope_type": "yarn",
            "factor": scaling.factor,
            "original_max_position_embeddings": scaling.original_seq_len,
            "beta_fast": scaling.beta_fast,
            "beta_slow": scaling.beta_slow,
        }
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_seq_len,
    }
