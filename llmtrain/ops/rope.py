"""Rotary position embedding: the rotation alone; the model computes cos and sin."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from llmtrain.ops.registry import Call, register


@register("rope", "reference", speed=0)
def rope_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x * cos + rotate(x) * sin with rotate (x1, x2) -> (-x2, x1) on halves of the last dim (arXiv 2104.09864).

    x [B,H,S,d], cos and sin [B or 1,1,S,d]; computed in the wider of their dtypes, returned in x's dtype.
    """
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


def _supports_halves(call: Call) -> str | None:
    if call.device == "cpu" and call.dtype.itemsize == 2:
        return "is slower than the reference in 16 bits on the CPU"
    return None


@register("rope", "halves", speed=1, supports=_supports_halves)
def rope_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The same without the rotated copy of x, keeping only cos and sin for the backward pass; cos and sin get no gradient."""
    return _Rope.apply(x, cos, sin) if torch.is_grad_enabled() else _rotate(x, cos, sin)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    out = x * cos
    out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
    out[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return out.to(x.dtype)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        half = grad.shape[-1] // 2
        out = grad * cos
        out[..., :half].addcmul_(grad[..., half:], sin[..., half:])
        out[..., half:].addcmul_(grad[..., :half], sin[..., :half], value=-1)
        return out.to(grad.dtype), None, None
