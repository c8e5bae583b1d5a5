"""Rotary position embedding (arXiv 2104.09864): the rotation alone."""

from typing import Any

import torch
from llmtrain_kernels.triton_pointwise.checks import check
from torch import Tensor

ELEMENTS = 2048
"""Of x that a block turns, at most, if its head dim is not above this."""


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x * cos + rotate(x) * sin with rotate (x1, x2) -> (-x2, x1) on halves of the last dim, in fp32, returned in x's dtype.

    x [B,H,S,d] in any layout whose last dim is contiguous, cos and sin [B or 1,1,S,d], which get no gradient. Raises ValueError otherwise.
    """
    check("rope", x, cos, sin)
    wanted = (x.shape[0], 1, *x.shape[2:])
    if x.dim() != 4 or cos.shape != sin.shape or cos.shape[1:] != wanted[1:] or cos.shape[0] not in (1, x.shape[0]) or x.shape[3] % 2:
        raise ValueError(
            f"rope in Triton: x {tuple(x.shape)}, cos {tuple(cos.shape)}, sin {tuple(sin.shape)}; needed [B,H,S,d], [B or 1,1,S,d]"
        )
    return rope_op(x, cos.detach(), sin.detach(), False)


@torch.library.custom_op("llmtrain_kernels::triton_rope", mutates_args=())
def rope_op(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    """The turn, or with `back` the transposed one, which is its gradient."""
    from llmtrain_kernels.triton_pointwise.programs import rope_turn

    x = x if x.stride(-1) == 1 else x.contiguous()
    cos, sin, out = cos.contiguous(), sin.contiguous(), torch.empty_like(x)
    batch, heads, rows, width = x.shape
    half = 1 << (width // 2 - 1).bit_length()
    block = max(1, ELEMENTS // (2 * half))
    if x.numel():
        strides = (*x.stride()[:3], *out.stride()[:3], cos.stride(0) if cos.shape[0] > 1 else 0)
        grid = (batch * heads * -(-rows // block),)
        rope_turn[grid](x, cos, sin, out, *strides, heads, rows, width // 2, BACK=back, ROWS=block, HALF=half)
    return out


@rope_op.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    return torch.empty_like(x) if x.stride(-1) == 1 else x.new_empty(x.shape)


def _keep(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:3])
    ctx.back = inputs[3]


def _backward(ctx: Any, grad: Tensor) -> tuple:
    return rope_op(grad, *ctx.saved_tensors, not ctx.back), None, None, None


rope_op.register_autograd(_backward, setup_context=_keep)
