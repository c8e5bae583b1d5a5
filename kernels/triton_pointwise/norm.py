"""RMSNorm (arXiv 1910.07467)."""

from typing import Any

import torch
from llmtrain_kernels.triton_pointwise.checks import check
from torch import Tensor

WIDEST = 16384
"""A row is held by one block."""

PROGRAMS = 256
"""Blocks of the backward pass, each with a sum of its own of the weight's gradient: about two for each multiprocessor."""


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..,D] / sqrt(mean(x^2) + eps) * weight [D], in fp32, returned in x's dtype. Raises ValueError for D above 16,384 or for fp64."""
    check("rms_norm", x, weight)
    if x.shape[-1] > WIDEST or weight.shape != x.shape[-1:]:
        raise ValueError(f"rms_norm in Triton: x {tuple(x.shape)}, weight {tuple(weight.shape)}; needed [..,D] and [D], D up to {WIDEST}")
    return rms_norm_op(x, weight, eps)[0]


def _block(width: int) -> dict[str, int]:
    """The power of two that holds a row, and warps for it."""
    block = 1 << (width - 1).bit_length()
    return {"WIDTH": block, "num_warps": min(16, max(1, block // 512))}


@torch.library.custom_op("llmtrain_kernels::triton_rms_norm", mutates_args=())
def rms_norm_op(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The result, and 1 / rms of each row in fp32."""
    from llmtrain_kernels.triton_pointwise.programs import rms_norm_forward

    x = x.contiguous()
    out, scale = torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)
    if x.numel():
        rms_norm_forward[(scale.numel(),)](x, weight.contiguous(), out, scale, x.shape[-1], eps, **_block(x.shape[-1]))
    return out, scale


@rms_norm_op.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=torch.float32)


@torch.library.custom_op("llmtrain_kernels::triton_rms_norm_backward", mutates_args=())
def rms_norm_backward_op(grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the weight."""
    from llmtrain_kernels.triton_pointwise.programs import rms_norm_backward

    grad, x = grad.contiguous(), x.contiguous()
    rows, width = scale.numel(), x.shape[-1]
    each = max(1, -(-rows // PROGRAMS))
    grad_x, parts = torch.empty_like(x), x.new_zeros(-(-rows // each), width, dtype=torch.float32)
    if x.numel():
        args = (grad, x, weight.contiguous(), scale, grad_x, parts, rows, width, each)
        rms_norm_backward[(len(parts),)](*args, **_block(width))
    return grad_x, parts.sum(0).to(weight.dtype)


@rms_norm_backward_op.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _keep(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:2], output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple:
    return *rms_norm_backward_op(grad, *ctx.saved_tensors), None


rms_norm_op.register_autograd(_backward, setup_context=_keep)
