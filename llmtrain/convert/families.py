"""Which Hugging Face family computes what a model section describes."""

from llmtrain.config.model import ModelConfig
from llmtrain.errors import UserError

FAMILIES = ("llama", "qwen2", "qwen3", "openpangu", "mixtral", "qwen3_moe", "deepseek_v3")
LATENT_EPS = 1e-6
"""eps of the norms inside DeepSeek-V3's attention, which its config.json cannot change."""


def pick_family(cfg: ModelConfig) -> str:
    """The Hugging Face family that computes exactly what `cfg` does; UserError with the option in the way if there is none.

    What matters in training alone (`ffn.balance`, `ffn.capacity`, the rate at which router biases move) has no counterpart and is let pass.
    """
    family, own = _nearest(cfg)
    for option, hit in (_common(cfg) | own).items():
        if hit:
            raise UserError(f"no Hugging Face family here computes {option}; families: {', '.join(FAMILIES)} (set checkpoint.export: none)")
    return family


def _common(cfg: ModelConfig) -> dict[str, bool]:
    return {
        f"model.family {cfg.family}": cfg.family != "transformer",
        f"model.mtp.heads {cfg.mtp.heads}": cfg.mtp.heads > 0,
        "model.norm.kind layer_norm": cfg.norm.kind != "rms_norm",
        "model.ffn.activation gelu": cfg.ffn.activation != "swiglu",
        "model.position.kind learned": cfg.position.kind != "rope",
    }


def _nearest(cfg: ModelConfig) -> tuple[str, dict[str, bool]]:
    """The only family that may do, and which options are in its way."""
    if cfg.attention.kind == "mla":
        return "deepseek_v3", _latent(cfg) | (_routed(cfg) | _deepseek_router(cfg) if cfg.ffn.kind == "moe" else {})
    if cfg.ffn.kind == "moe":
        family = "qwen3_moe" if cfg.attention.qk_norm else "mixtral"
        return family, _routed(cfg) | _plain_router(cfg) | (_qwen3_moe(cfg) if family == "qwen3_moe" else _mixtral(cfg))
    return _dense(cfg)


def _dense(cfg: ModelConfig) -> tuple[str, dict[str, bool]]:
    """Llama and Qwen3 have biases on all four attention projections or on none, Qwen2 on query, key and value; only the last two know a
    sliding window."""
    a, bias = cfg.attention, cfg.ffn.bias
    sandwich, uneven = cfg.norm.placement != "pre", a.qkv_bias and not a.out_bias
    refused = {
        "model.attention.window without qk_norm or Qwen2's biases": a.window is not None and (sandwich or not (a.qk_norm or uneven)),
        "model.attention.out_bias without qkv_bias": a.out_bias and not a.qkv_bias,
        "model.attention.qkv_bias with qk_norm and without out_bias": uneven and a.qk_norm,
        "model.ffn.bias with qk_norm": bias and a.qk_norm,
        "model.ffn.bias with attention.qkv_bias and without attention.out_bias": bias and uneven,
        f"model.norm.placement {cfg.norm.placement} with biases or qk_norm": sandwich and (a.qkv_bias or a.qk_norm or bias),
    }
    return "openpangu" if sandwich else "qwen3" if a.qk_norm else "qwen2" if uneven else "llama", refused


def _routed(cfg: ModelConfig) -> dict[str, bool]:
    ffn = cfg.ffn
    return {
        f"model.norm.placement {cfg.norm.placement} with a mixture of experts": cfg.norm.placement != "pre",
        f"model.ffn.descend {ffn.descend}": ffn.descend is not None,
        "model.ffn.bias of a mixture of experts": ffn.bias,
        "model.ffn.router.force_balance": ffn.router.force_balance,
    }


def _plain_router(cfg: ModelConfig) -> dict[str, bool]:
    ffn, router = cfg.ffn, cfg.ffn.router
    beside = "without attention.kind mla"
    return {
        f"model.ffn.shared_experts {beside}": ffn.shared_experts > 0,
        f"model.ffn.router.score {router.score} {beside}": router.score != "softmax",
        f"model.ffn.router.scale {beside}": router.scale != 1.0,
        f"model.ffn.router.top_groups {beside}": router.top_groups < router.groups,
        f"model.ffn.router.bias_rate {beside}": router.bias_rate is not None,
    }


def _qwen3_moe(cfg: ModelConfig) -> dict[str, bool]:
    return {"model.attention.qkv_bias unlike attention.out_bias": cfg.attention.qkv_bias != cfg.attention.out_bias}


def _mixtral(cfg: ModelConfig) -> dict[str, bool]:
    without = "with experts and without attention.qk_norm"
    return {
        f"model.attention.qkv_bias or out_bias {without}": cfg.attention.qkv_bias or cfg.attention.out_bias,
        f"model.ffn.router.renormalise false {without}": not cfg.ffn.router.renormalise,
        f"model.ffn.dense_layers {without}": cfg.ffn.dense_layers > 0,
    }


def _latent(cfg: ModelConfig) -> dict[str, bool]:
    a, scaling, eps = cfg.attention, cfg.position.scaling, cfg.attention.norm_eps or cfg.norm.eps
    stretched = scaling is not None and scaling.kind == "yarn" and scaling.factor > 1
    return {
        f"model.norm.placement {cfg.norm.placement} with attention.kind mla": cfg.norm.placement != "pre",
        "model.attention.window with attention.kind mla": a.window is not None,
        f"model.attention.norm_eps {eps:g} ({LATENT_EPS:g} alone; by default it is norm.eps)": eps != LATENT_EPS,
        "model.attention.softmax_scale without position.scaling yarn": a.softmax_scale is not None and not stretched,
        "model.ffn.bias with attention.kind mla": cfg.ffn.bias,
    }


def _deepseek_router(cfg: ModelConfig) -> dict[str, bool]:
    ffn, router = cfg.ffn, cfg.ffn.router
    return {
        f"model.ffn.router.score {router.score} with attention.kind mla": router.score != "sigmoid",
        f"model.ffn.router.groups {router.groups} of one expert": ffn.experts // router.groups < 2,
    }
