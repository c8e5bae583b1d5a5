"""RMSNorm, alone and with the residual sum before it."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from llmtrain.ops.npu import gateway
from llmtrain.ops.npu.gateway import DTYPES, NAME, SPEED, needs, reject
from llmtrain.ops.registry import register


def _check(op: str, x: Tensor, weight: Tensor) -> None:
    if weight.shape != x.shape[-1:] or not 2 <= x.dim() <= 8:
        raise reject(op, f"x {tuple(x.shape)}, weight {tuple(weight.shape)}", "x [..,D] of 2 to 8 dims and weight [D]")


@register("rms_norm", NAME, devices=("npu",), dtypes=DTYPES, speed=SPEED, probe=needs("npu_rms_norm"))
def rms_norm_npu(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """npu_rms_norm: computed in fp32. The weight is taken in x's dtype, as the operator needs."""
    _check("rms_norm", x, weight)
    return gateway.fused("npu_rms_norm")(x, weight.to(x.dtype), eps)[0]


@register("add_rms_norm", NAME, devices=("npu",), dtypes=DTYPES, speed=SPEED, probe=needs("npu_add_rms_norm", "npu_rms_norm_backward"))
def add_rms_norm_npu(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """npu_add_rms_norm: (rms_norm(x + residual), x + residual) in one pass. The operator gives the sum last, after 1 / rms."""
    _check("add_rms_norm", x, weight)
    if x.shape != residual.shape or x.dtype != residual.dtype:
        found = f"x {tuple(x.shape)} {x.dtype}, residual {tuple(residual.shape)} {residual.dtype}"
        raise reject("add_rms_norm", found, "one shape and dtype")
    weight = weight.to(x.dtype)
    return _AddRmsNorm.apply(x, residual, weight, eps) if torch.is_grad_enabled() else _fused(x, residual, weight, eps)[::2]


def _fused(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The norm, 1 / rms [..,1] and the sum."""
    return gateway.fused("npu_add_rms_norm")(x, residual, weight, eps)


class _AddRmsNorm(torch.autograd.Function):
    """The operator has no derivative, but that of npu_rms_norm takes what it returns."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        normed, scale, total = _fused(x, residual, weight, eps)
        ctx.save_for_backward(total, weight, scale)
        return normed, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_total: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        total, weight, scale = ctx.saved_tensors  # asked for once: selective recomputation does not allow more
        grad_sum, grad_weight = gateway.fused("npu_rms_norm_backward")(grad, total, weight, scale)
        grad_sum = grad_sum + grad_total
        return grad_sum, grad_sum, grad_weight.to(weight.dtype), None
