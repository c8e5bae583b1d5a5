"""Arguments of Megatron-LM and MindSpeed-LLM -> our `model` section. Needs no torch."""

import math
from collections.abc import Callable
from typing import Any

from llmtrain.convert.megatron_arguments import Given, flag, layer_pattern
from llmtrain.convert.rope_read import magnitude

Say = Callable[[str], None]
"""Takes a sentence about something that has no counterpart and changes what is computed."""


def model_values(given: Given, say: Say = lambda text: None) -> dict[str, Any]:
    """The `model` section, as plain values. What is not given has Megatron-LM's default, which is written out where ours is another.

    Raises UserError for what makes no model; `say` is told what cannot be had here.
    """
    layers = given.required("num_layers") - _idle(given, say)
    hidden = given.required("hidden_size")
    bias = _linear_bias(given)
    values = {
        "vocab_size": given.integer("vocab_size", "padded_vocab_size"),
        "layers": layers,
        "hidden": hidden,
        "max_seq_len": given.integer("max_position_embeddings", default=given.integer("seq_length")),
        "attention": _latent(given, say) if _is_latent(given) else _grouped(given, hidden, bias, say),
        "ffn": _feed_forward(given, layers, hidden, bias, say),
        "norm": _norm(given, say),
        "position": _position(given, say),
        "init": _init(given),
        "tie_embeddings": _tied(given),
        "mtp": _mtp(given, say),
    }
    given.get("padded_vocab_size", "make_vocab_size_divisible_by")
    _refuse(given, say)
    return {key: value for key, value in values.items() if value is not None}


def _idle(given: Given, say: Say) -> int:
    """MindSpeed-LLM counts layers that do nothing, which only fill a pipeline, as layers."""
    listed = given.get("noop_layers")
    if listed is None:
        return 0
    names = sorted({str(item) for item in (listed if isinstance(listed, list) else str(listed).split(","))}, key=int)
    say(f"{flag('noop_layers', listed)}: layers that do nothing are left out; parallel.layers_per_stage says which stage has how many")
    return len(names)


def _linear_bias(given: Given) -> bool:
    off = given.on("disable_bias_linear")
    return bool(given.get("add_bias_linear", default=True)) and not off


def _tied(given: Given) -> bool:
    apart = given.on("untie_embeddings_and_output_weights")
    return not apart


def _is_latent(given: Given) -> bool:
    return given.on("multi_latent_attention", "multi_head_latent_attention")


def _grouped(given: Given, hidden: int, bias: bool, say: Say) -> dict[str, Any]:
    heads = given.required("num_attention_heads")
    grouped = given.on("group_query_attention")
    kv_heads = given.integer("num_query_groups", default=1)
    width = given.integer("kv_channels")
    values: dict[str, Any] = {"heads": heads, "kv_heads": kv_heads if grouped else heads}
    if width is not None and width * heads != hidden:
        values["head_dim"] = width
    values |= {"qkv_bias": bias or given.on("add_qkv_bias"), "out_bias": bias or given.on("add_dense_bias")}
    values |= {"qk_norm": given.on("qk_layernorm"), "window": _window(given)}
    return {key: value for key, value in values.items() if value not in (None, False)}


def _window(given: Given) -> int | None:
    """Megatron's window is (keys before, keys after); ours counts the query's own place too."""
    size = given.get("window_size")
    if size is None:
        return given.integer("sliding_window")
    before = size[0] if isinstance(size, list | tuple) else int(str(size).strip("()").split(",")[0])
    return before + 1


def _latent(given: Given, say: Say) -> dict[str, Any]:
    nope = given.integer("qk_head_dim", "qk_nope_head_dim", default=128)
    rope = given.integer("qk_pos_emb_head_dim", "qk_rope_head_dim", default=64)
    values = {
        "kind": "mla",
        "heads": given.required("num_attention_heads"),
        "query_rank": given.integer("q_lora_rank"),
        "kv_rank": given.integer("kv_lora_rank", default=32),
        "nope_dim": nope,
        "rope_dim": rope,
        "value_dim": given.integer("v_head_dim", default=128),
    }
    if not given.on("qk_layernorm"):
        say("--multi-latent-attention without --qk-layernorm: the narrow vectors of model.attention.kind mla always have norms here")
    given.get("group_query_attention", "num_query_groups", "kv_channels")  # which mean nothing to it
    stretch = yarn(given)
    over = 0.0 if stretch is None else stretch["mscale_all_dim"]
    if over:
        values["softmax_scale"] = magnitude(stretch["factor"], over) ** 2 / math.sqrt(nope + rope)
    return values


def _norm(given: Given, say: Say) -> dict[str, Any]:
    kind = given.get("normalization", default="LayerNorm")
    if kind not in ("LayerNorm", "RMSNorm"):
        say(f"--normalization {kind}: there are rms_norm and layer_norm")
    if kind == "LayerNorm" and given.on("qk_layernorm"):
        say("--qk-layernorm with --normalization LayerNorm: model.attention.qk_norm is an RMSNorm")
    if given.on("apply_layernorm_1p", "layernorm_zero_centered_gamma"):
        say("--apply-layernorm-1p: gammas are stored as they are, not less 1; their weight decay pulls to 0, not to 1")
    values = {"kind": "rms_norm" if kind == "RMSNorm" else "layer_norm"}
    values["eps"] = given.number("norm_epsilon", "layernorm_epsilon", default=1e-5)
    return values | ({"placement": "sandwich"} if given.on("sandwich_norm") else {})


def _feed_forward(given: Given, layers: int, hidden: int, bias: bool, say: Say) -> dict[str, Any]:
    gated = given.on("swiglu")
    width = given.integer("ffn_hidden_size", default=int(4 * hidden * 2 / 3 / 64) * 64 if gated else 4 * hidden)
    if not gated and not given.on("openai_gelu", "bias_gelu_fusion") and not bias:
        say("GELU without bias: Megatron's is exact, that of model.ffn.activation gelu the tanh form")
    dense = {"hidden": width, "activation": "swiglu" if gated else "gelu"} | ({"bias": True} if bias else {})
    experts = given.integer("num_experts")
    return dense if experts is None else _experts(given, experts, layers, dense, say)


def _experts(given: Given, experts: int, layers: int, dense: dict[str, Any], say: Say) -> dict[str, Any]:
    width = given.integer("moe_ffn_hidden_size", "moe_intermediate_size", default=dense["hidden"])
    before = _dense_layers(given, layers, say)
    values = {"kind": "moe", "experts": experts, "top_k": given.integer("moe_router_topk", default=2)} | dense | {"hidden": width}
    values |= {"dense_layers": before, "dense_hidden": dense["hidden"]} if before else {}
    values |= _shared(given, width, say)
    if (latent := given.integer("moe_latent_size")) is not None:
        values["descend"] = latent
    values["router"] = _router(given, values["top_k"], say)
    values |= _balance(given, say)
    return values | _capacity(given)


def _dense_layers(given: Given, layers: int, say: Say) -> int:
    first = given.integer("first_k_dense_replace", default=-1)
    pattern = layer_pattern(given.get("moe_layer_freq", default=1), layers)
    pattern = [here and layer >= first for layer, here in enumerate(pattern)]
    before = pattern.index(True) if True in pattern else layers
    if not all(pattern[before:]):
        say("--moe-layer-freq: dense layers are the first ones (model.ffn.dense_layers), and experts in all after them")
    return before


def _shared(given: Given, width: int, say: Say) -> dict[str, Any]:
    count, size = given.integer("n_shared_experts"), given.integer("moe_shared_expert_intermediate_size")
    if given.on("moe_shared_expert_gate", "shared_expert_gate"):
        say("--moe-shared-expert-gate: shared experts have no gate here")
    if size is not None and size % width:
        say(f"--moe-shared-expert-intermediate-size {size} is no multiple of the experts' width {width} (model.ffn.shared_experts)")
    found = count if count is not None else -(-size // width) if size is not None else 0
    return {"shared_experts": found} if found else {}


def _router(given: Given, top_k: int, say: Say) -> dict[str, Any]:
    score = given.get("moe_router_score_function", default="softmax")
    if score not in ("softmax", "sigmoid"):
        say(f"--moe-router-score-function {score}: there are softmax and sigmoid")
    before, divided = given.on("moe_router_pre_softmax"), given.on("norm_topk_prob")
    values: dict[str, Any] = {"score": score} if score == "sigmoid" else {}
    if score == "softmax" and before and not divided:
        values["renormalise"] = False
    if (scale := given.number("moe_router_topk_scaling_factor", "routed_scaling_factor")) not in (None, 1.0):
        values["scale"] = scale
    groups, top = given.integer("moe_router_num_groups", "n_group"), given.integer("moe_router_group_topk", "topk_group")
    if groups not in (None, 1) and top is not None:
        values |= {"groups": groups, "top_groups": top}
        if top_k // top != 2:
            say(f"--moe-router-group-topk {top}: Megatron ranks groups by their {top_k // top} highest scores, model.ffn.router by two")
    if given.on("moe_router_enable_expert_bias"):
        values["bias_rate"] = given.number("moe_router_bias_update_rate", default=1e-3)
    if z := given.number("moe_z_loss_coeff"):
        values["z_loss"] = z
    if given.on("moe_router_force_load_balancing", "fix_router"):
        values["force_balance"] = True
    return values


def _balance(given: Given, say: Say) -> dict[str, Any]:
    kind, weight = given.get("moe_router_load_balancing_type", default="aux_loss"), given.number("moe_aux_loss_coeff", default=0.0)
    kind = "seq_aux_loss" if given.on("seq_aux") else kind
    if isinstance(kind, list) or kind == "sinkhorn":
        say(f"{flag('moe_router_load_balancing_type', kind)}: one loss that balances experts, or none (model.ffn.balance)")
        return {}
    if not weight or kind in ("none", "noaux_tc"):
        return {}
    groups = {"seq_aux_loss": 1, "global_aux_loss": "step"}
    return {"balance": {"weight": weight, "sequences": groups.get(kind, given.integer("micro_batch_size", default=1))}}


def _capacity(given: Given) -> dict[str, Any]:
    factor = given.number("moe_expert_capacity_factor")
    return {"capacity": {"factor": factor, "sequences": given.integer("micro_batch_size", default=1)}} if factor else {}


def yarn(given: Given) -> dict[str, Any] | None:
    """YaRN of latent attention, or MindSpeed-LLM's: factor, original, betas, mscale, mscale_all_dim; None without."""
    mindspeed = given.get("rope_scaling_type") == "yarn"
    kind = given.get("rope_type", default="yarn" if given.on("multi_latent_attention") else "rope")
    factor = given.number("rope_scaling_factor" if mindspeed else "rotary_scaling_factor", default=1.0)
    names = {
        "original": ("rope_scaling_original_max_position_embeddings", "original_max_position_embeddings"),
        "beta_fast": ("rope_scaling_beta_fast", "beta_fast"),
        "beta_slow": ("rope_scaling_beta_slow", "beta_slow"),
        "mscale": ("rope_scaling_mscale", "mscale"),
        "mscale_all_dim": ("rope_scaling_mscale_all_dim", "mscale_all_dim"),
    }
    usual = {"original": 4096, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 0.0}
    read = {name: given.number(*options, default=usual[name]) for name, options in names.items()}
    return {"factor": factor} | read if (mindspeed or kind == "yarn") and factor > 1 else None


def _position(given: Given, say: Say) -> dict[str, Any]:
    kind = given.get("position_embedding_type", default="learned_absolute")
    if not (given.on("use_rotary_position_embeddings") or kind in ("rope", "yarn") or _is_latent(given)):
        if kind != "learned_absolute":
            say(f"--position-embedding-type {kind}: there are rope and learned")
        return {"kind": "learned"}
    if given.number("rotary_percent", default=1.0) != 1.0:
        say("--rotary-percent: every number of a head is rotated here")
    if given.get("rotary_seq_len_interpolation_factor") is not None:
        say("--rotary-seq-len-interpolation-factor: there is no linear interpolation (model.position.scaling)")
    if given.on("rotary_interleaved"):
        say("--rotary-interleaved: pairs that are rotated stand half a head apart here")
    values: dict[str, Any] = {"base": given.number("rotary_base", default=10_000.0)}
    stretch = yarn(given)
    if stretch is not None:
        values["scaling"] = _stretched(stretch)
    elif given.on("use_rope_scaling"):
        values["scaling"] = {"kind": "llama3", "factor": given.number("rope_scaling_factor", default=8.0)}
    return values


def _stretched(stretch: dict[str, Any]) -> dict[str, Any]:
    factor = stretch["factor"]
    values = {"kind": "yarn", "factor": factor, "original_seq_len": int(stretch["original"])}
    values |= {"beta_fast": stretch["beta_fast"], "beta_slow": stretch["beta_slow"]}
    return values | {"attention_factor": magnitude(factor, stretch["mscale"]) / magnitude(factor, stretch["mscale_all_dim"])}


def _init(given: Given) -> dict[str, Any]:
    values = {"std": given.number("init_method_std", default=0.02)}
    embedding = given.number("embedding_init_method_std")
    return values if embedding is None else values | {"embedding_std": embedding}


def _mtp(given: Given, say: Say) -> dict[str, Any] | None:
    heads = given.integer("mtp_num_layers", default=0)
    weight = given.number("mtp_loss_scaling_factor", default=0.1)
    if not heads:
        return None
    say("--mtp-num-layers: each of Megatron's has a final norm of its own; model.mtp shares the model's")
    return {"heads": heads, "loss_weight": weight}


def _refuse(given: Given, say: Say) -> None:
    """What would compute something else, and has nothing to do with one of the sections."""
    for name in ("attention_dropout", "hidden_dropout"):
        if rate := given.number(name, default=0.1):
            say(f"{flag(name, rate)}{'' if name in given else ' (the default)'}: there is no dropout here")
    for name in ("squared_relu", "quick_geglu", "init_method_xavier_uniform", "apply_residual_connection_post_layernorm", "qk_clip"):
        if given.on(name):
            say(f"{flag(name)}: not to be had here")
