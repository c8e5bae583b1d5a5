"""RMSNorm, LayerNorm and AdamW of NVIDIA's Transformer Engine. Not run on hardware: the calls are those that its own layers of version
2.20.2 make, and tested on stand-ins. So `auto` takes none.

Its layers own their weights, read them again in the backward pass and empty the input that they saved; ours are handed weights, which FSDP
lets go in between, and an input that others read. So the functions below the layers are called.
"""

import importlib
import importlib.util
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from llmtrain.ops.adamw import Groups
from llmtrain.ops.fast_attention import UNMEASURED
from llmtrain.ops.fused_adam import adamw_of
from llmtrain.ops.registry import register
from llmtrain.packages import installed_version

INSTALL = "pip install --no-build-isolation 'transformer_engine[pytorch]'"


def _probe() -> str | None:
    if importlib.util.find_spec("transformer_engine") is None:
        return f"needs the package transformer_engine: {INSTALL}"
    if importlib.util.find_spec("transformer_engine_torch") is None and installed_version("transformer_engine_torch") is None:
        return f"needs transformer_engine with its part for torch: {INSTALL}"
    return None


SERVES = {"devices": ("cuda",), "speed": UNMEASURED, "probe": _probe}
NORM = SERVES | {"dtypes": (torch.float32, torch.bfloat16, torch.float16)}
NO_MARGIN, ZERO_CENTRED = 0, False
"""The kernels may use all multiprocessors; the weight is the factor itself."""


@register("rms_norm", "transformer_engine", **NORM)
def rms_norm_te(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As `rms_norm_reference`. The weight is taken in x's dtype."""
    return _RmsNorm.apply(x, weight.to(x.dtype), eps)


@register("layer_norm", "transformer_engine", **NORM)
def layer_norm_te(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """As `layer_norm_reference`. Weight and bias are taken in x's dtype."""
    bias = torch.zeros_like(weight) if bias is None else bias
    return _LayerNorm.apply(x, weight.to(x.dtype), bias.to(x.dtype), eps)


@register("adamw", "transformer_engine", dtypes=(torch.float32,), **SERVES)
def adamw_te(groups: Groups, *, lr: float, betas: tuple[float, float], eps: float) -> torch.optim.Optimizer:
    """transformer_engine.pytorch.optimizers.FusedAdam; see `adamw_of`."""
    return adamw_of(importlib.import_module("transformer_engine.pytorch.optimizers").FusedAdam, groups, lr=lr, betas=betas, eps=eps)


def _binding() -> Any:
    """The functions of C++, which importing the package loads."""
    importlib.import_module("transformer_engine.pytorch")
    return importlib.import_module("transformer_engine_torch")


def _plain(dtype: torch.dtype) -> tuple[Any, ...]:
    """What the forward functions are told of their output: a new tensor, not quantized, of this dtype."""
    out, quantizer = None, None
    return out, quantizer, importlib.import_module("transformer_engine.pytorch.constants").TE_DType[dtype], NO_MARGIN, ZERO_CENTRED


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        rows = x.contiguous().view(-1, x.shape[-1])
        out, _, scale = _binding().rmsnorm_fwd(rows, weight, eps, *_plain(x.dtype))
        ctx.save_for_backward(rows, scale, weight)
        return out.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        rows, *rest = ctx.saved_tensors
        grad_x, grad_weight = _binding().rmsnorm_bwd(grad.contiguous().view(rows.shape), rows, *rest, NO_MARGIN, ZERO_CENTRED)
        return grad_x.view(grad.shape), grad_weight, None


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        rows = x.contiguous().view(-1, x.shape[-1])
        out, mean, scale = _binding().layernorm_fwd(rows, weight, bias, eps, *_plain(x.dtype))
        ctx.save_for_backward(rows, mean, scale, weight)
        return out.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        rows, *rest = ctx.saved_tensors
        grads = _binding().layernorm_bwd(grad.contiguous().view(rows.shape), rows, *rest, NO_MARGIN, ZERO_CENTRED)
        return grads[0].view(grad.shape), grads[1], grads[2], None
