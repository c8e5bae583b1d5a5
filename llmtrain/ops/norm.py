"""RMSNorm and LayerNorm: by the formula, PyTorch's own, and an RMSNorm whose gradient is written out."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from llmtrain.ops.registry import SEPARATE, register


@register("rms_norm", "reference", speed=0)
def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dim, in fp32 or higher, returned in x's dtype (arXiv 1910.07467)."""
    high = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = high * torch.rsqrt(high.square().mean(-1, keepdim=True) + eps)
    return (normed * weight.to(high.dtype)).to(x.dtype)


@register("rms_norm", "native", speed=1)
def rms_norm_native(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """torch.nn.functional.rms_norm, which computes 16-bit input in fp32. The weight is taken in x's dtype, as its fused path needs."""
    return F.rms_norm(x, weight.shape, weight.to(x.dtype), eps)


@register("rms_norm", "closed_form", devices=("cpu",), speed=2)
def rms_norm_closed_form(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The reference with its gradient in closed form: half the time on the CPU, where PyTorch has no fused RMSNorm, and only x is kept."""
    return _RmsNorm.apply(x, weight, eps) if torch.is_grad_enabled() else _scaled(x, weight, eps)[0]


def _scaled(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The result, and 1 / rms [..,1]."""
    high = x.to(torch.promote_types(x.dtype, torch.float32))
    norm = torch.linalg.vector_norm(high, dim=-1, keepdim=True)
    scale = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()  # [..,1]
    return (high * scale).mul_(weight.to(high.dtype)).to(x.dtype), scale


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        out, scale = _scaled(x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        grad, wide = grad.to(scale.dtype), weight.to(scale.dtype)
        normed = x.to(scale.dtype) * scale
        product = grad * normed
        mean = (product @ wide).unsqueeze(-1).div_(x.shape[-1])  # of grad * weight * normed over the last dim
        grad_x = (grad * wide).addcmul_(normed, mean, value=-1).mul_(scale)
        return grad_x.to(x.dtype), product.flatten(0, -2).sum(0).to(weight.dtype), None


@register("add_rms_norm", "reference", speed=0)
def add_rms_norm_reference(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(rms_norm(residual + x), residual + x), all [..,D]: the sum in the inputs' dtype, the norm as in `rms_norm_reference`."""
    total = residual + x
    return rms_norm_reference(total, weight, eps), total


@register("add_rms_norm", SEPARATE, speed=1, parts=("rms_norm",))
def add_rms_norm_separate(
    rms_norm: Callable[[Tensor, Tensor, float], Tensor], x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The sum, then the rms_norm that was chosen."""
    total = residual + x
    return rms_norm(total, weight, eps), total


@register("layer_norm", "reference", speed=0)
def layer_norm_reference(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias over the last dim, in fp32 or higher, returned in x's dtype (arXiv 1607.06450)."""
    high = x.to(torch.promote_types(x.dtype, torch.float32))
    centred = high - high.mean(-1, keepdim=True)
    normed = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps) * weight.to(high.dtype)
    return (normed if bias is None else normed + bias.to(high.dtype)).to(x.dtype)


@register("layer_norm", "native", speed=1)
def layer_norm_native(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """torch.nn.functional.layer_norm; weight and bias are taken in x's dtype, as its fused path needs."""
    return F.layer_norm(x, weight.shape, weight.to(x.dtype), None if bias is None else bias.to(x.dtype), eps)
