"""RMSNorm, LayerNorm and AdamW of NVIDIA's apex, where it is built. Not run on hardware: the calls are held to its signatures and tested
on stand-ins. So `auto` takes none. The package `apex` of the package index is another one, and is refused as such."""

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llmtrain.ops.adamw import Groups
from llmtrain.ops.fast_attention import UNMEASURED
from llmtrain.ops.fused_adam import adamw_of
from llmtrain.ops.registry import register
from llmtrain.packages import wrong_apex


def _needs(extension: str) -> Callable[[], str | None]:
    def probe() -> str | None:
        if importlib.util.find_spec("apex") is None:
            return "needs NVIDIA's apex, built from its source repository; the package index has another of that name"
        if wrong := wrong_apex():
            return wrong
        missing = importlib.util.find_spec(extension) is None
        return f"needs apex built with its CUDA extensions: there is no {extension}" if missing else None

    return probe


NORM = {
    "devices": ("cuda",),
    "dtypes": (torch.float32, torch.bfloat16, torch.float16),
    "speed": UNMEASURED,
    "probe": _needs("fused_layer_norm_cuda"),
}


@register("rms_norm", "apex", **NORM)
def rms_norm_apex(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As `rms_norm_reference`. The weight is taken in x's dtype, as its kernel needs."""
    memory_efficient = False
    return _norms().FusedRMSNormAffineFunction.apply(x, weight.to(x.dtype), weight.shape, eps, memory_efficient)


@register("layer_norm", "apex", **NORM)
def layer_norm_apex(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """As `layer_norm_reference`. Weight and bias are taken in x's dtype, as its kernel needs; it has none without a bias."""
    bias, memory_efficient = torch.zeros_like(weight) if bias is None else bias, False
    return _norms().FusedLayerNormAffineFunction.apply(x, weight.to(x.dtype), bias.to(x.dtype), weight.shape, eps, memory_efficient)


def _norms() -> Any:
    return importlib.import_module("apex.normalization.fused_layer_norm")


@register("adamw", "apex", devices=("cuda",), dtypes=(torch.float32,), speed=UNMEASURED, probe=_needs("amp_C"))
def adamw_apex(groups: Groups, *, lr: float, betas: tuple[float, float], eps: float) -> torch.optim.Optimizer:
    """apex.optimizers.FusedAdam; see `adamw_of`."""
    return adamw_of(importlib.import_module("apex.optimizers").FusedAdam, groups, lr=lr, betas=betas, eps=eps)
