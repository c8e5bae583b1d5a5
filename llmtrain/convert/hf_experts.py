"""config.json of mixtures of experts -> our `model` section: Mixtral, Qwen3-MoE, DeepSeek-V3."""

from typing import Any

from llmtrain.convert.families import LATENT_EPS
from llmtrain.convert.hf_fields import Fields
from llmtrain.convert.rope_read import latent_scale


def mixtral(read: Fields, values: dict[str, Any]) -> dict[str, Any]:
    """A Llama without biases whose feed-forward branches are all mixtures of experts."""
    read.only("router_jitter_noise", 0)
    window = read.config.get("sliding_window")
    values["max_seq_len"] = read.integer("max_position_embeddings", 131_072)
    values["norm"] = {"eps": read.number("rms_norm_eps", 1e-5)}
    values["attention"] |= {"kv_heads": read.integer("num_key_value_heads", 8), "head_dim": read.head_dim(values)}
    values["attention"] |= {"window": None if window is None else read.integer("sliding_window")}
    values["ffn"] |= {"kind": "moe", "experts": _experts(read, 8), "top_k": read.integer("num_experts_per_tok", 2)}
    return values


def qwen3_moe(read: Fields, values: dict[str, Any]) -> dict[str, Any]:
    """Qwen3 with experts in all blocks but perhaps the first ones."""
    read.only("decoder_sparse_step", 1)
    bias, window = read.flag("attention_bias"), read.flag("use_sliding_window") and read.config.get("sliding_window", 4096) is not None
    values["max_seq_len"] = read.integer("max_position_embeddings", 32_768)
    values["attention"] |= {"kv_heads": read.integer("num_key_value_heads", 4), "head_dim": read.head_dim(values), "qk_norm": True}
    values["attention"] |= {"qkv_bias": bias, "out_bias": bias, "window": read.integer("sliding_window", 4096) if window else None}
    experts = {"experts": _experts(read, 128), "top_k": read.integer("num_experts_per_tok", 8)}
    experts |= {"hidden": read.integer("moe_intermediate_size", 768)}
    router = {"renormalise": read.flag("norm_topk_prob")}
    values["ffn"] = _after_dense(values, _first_layers(read)) | experts | {"router": router}
    return values


def deepseek_v3(read: Fields, values: dict[str, Any]) -> dict[str, Any]:
    """Latent attention; experts chosen by sigmoids with a bias, within groups, beside shared ones, in all blocks but the first."""
    only = {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "moe_layer_freq": 1, "rope_interleave": True, "attention_bias": False}
    for name, allowed in only.items():
        read.only(name, allowed)
    values["max_seq_len"] = read.integer("max_position_embeddings", 4096)
    values["attention"] = _latent(read, values)
    dense = _given(read, "first_k_dense_replace", 3, least=0)
    if dense >= values["layers"]:
        return values
    router = {
        "score": "sigmoid",
        "renormalise": read.flag("norm_topk_prob", True),
        "scale": read.number("routed_scaling_factor", 2.5),
        "groups": _given(read, "n_group", 8),
        "top_groups": _given(read, "topk_group", 4),
        "bias_rate": 0.0,  # the bias is there; whether training moves it is for the run to say
    }
    experts = {"experts": read.integer("n_routed_experts", 256), "top_k": _given(read, "num_experts_per_tok", 8)}
    experts |= {"hidden": read.integer("moe_intermediate_size", 2048), "shared_experts": _given(read, "n_shared_experts", 1, least=0)}
    values["ffn"] = _after_dense(values, dense) | experts | {"router": router}
    return values


def _latent(read: Fields, values: dict[str, Any]) -> dict[str, Any]:
    heads = values["attention"]["heads"]
    if read.integer("num_key_value_heads", heads) != heads:
        raise read.error("num_key_value_heads", read.config["num_key_value_heads"], f"num_attention_heads, {heads}")
    dims = {"nope_dim": read.integer("qk_nope_head_dim", 128), "rope_dim": read.integer("qk_rope_head_dim", 64)}
    found = {"kind": "mla", "heads": heads, "query_rank": None, "kv_rank": read.integer("kv_lora_rank", 512)}
    if read.config.get("q_lora_rank", 1536) is not None:
        found["query_rank"] = read.integer("q_lora_rank", 1536)
    found |= dims | {"value_dim": read.integer("v_head_dim", 128)}
    found["softmax_scale"] = latent_scale(read.config, sum(dims.values()), where=read.where)
    if values["norm"]["eps"] != LATENT_EPS:
        found["norm_eps"] = LATENT_EPS
    return found


def _given(read: Fields, name: str, default: int, *, least: int = 1) -> int:
    """An integer whose default null does not stand for."""
    return default if name not in read.config else read.integer(name, least=least)


def _experts(read: Fields, default: int) -> int:
    """transformers 5 writes the second name where 4 wrote the first, and the other way round."""
    return read.integer("num_experts", read.integer("num_local_experts", default))


def _after_dense(values: dict[str, Any], layers: int) -> dict[str, Any]:
    """A mixture of experts after `layers` dense blocks, as wide as the section has it."""
    return {"kind": "moe"} | ({"dense_layers": layers, "dense_hidden": values["ffn"]["hidden"]} if layers else {})


def _first_layers(read: Fields) -> int:
    """How many blocks have a dense branch, which must be the first ones."""
    layers = read.config.get("mlp_only_layers") or []
    if not isinstance(layers, list) or sorted(layers) != list(range(len(layers))):
        raise read.error("mlp_only_layers", layers, "the first layers alone, such as [0, 1]")
    return len(layers)
