"""Rotary embedding and SwiGLU."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from llmtrain.ops.npu import gateway
from llmtrain.ops.npu.gateway import DTYPES, NAME, SPEED, needs, reject
from llmtrain.ops.registry import Call, register

LARGEST_ROTARY = 895
MOST_ROWS = 999
"""Batch rows, and heads, of one rotary call."""


def _supports_rotary(call: Call) -> str | None:
    dim = call.head_dim or 2
    if dim % 2 or dim > LARGEST_ROTARY:
        return f"rotates even head sizes below {LARGEST_ROTARY + 1}, not {dim}"
    return None


@register("rope", NAME, devices=("npu",), dtypes=DTYPES, speed=SPEED, probe=needs("npu_rotary_mul"), supports=_supports_rotary)
def rope_npu(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """npu_rotary_mul in its half mode, in the wider of the dtypes like the reference: cos and sin in 16 bits would blur far positions.

    The gradient is the rotation backwards, by the same operator, so only cos and sin are kept; they get none.
    """
    b, h, s, d = x.shape
    fits = cos.shape == sin.shape and cos.shape[1:] == (1, s, d) and cos.shape[0] in (1, b) and d % 2 == 0
    if not fits or b > MOST_ROWS or h > MOST_ROWS or d > LARGEST_ROTARY:
        shapes = f"x {tuple(x.shape)}, cos {tuple(cos.shape)}, sin {tuple(sin.shape)}"
        raise reject("rope", shapes, "x [B,H,S,d], cos and sin [B or 1,1,S,d] with even d up to 894, B and H up to 999")
    return _Rotary.apply(x, cos, sin) if torch.is_grad_enabled() else _rotate(x, cos, sin)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    wide = torch.promote_types(x.dtype, cos.dtype)
    return gateway.fused("npu_rotary_mul")(x.to(wide), cos.to(wide), sin.to(wide), "half").to(x.dtype)


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        back = -sin.roll(sin.shape[-1] // 2, dims=-1)  # the halves may differ, and each is met by the other half of the gradient
        return _rotate(grad, cos, back), None, None


@register("swiglu", NAME, devices=("npu",), dtypes=DTYPES, speed=SPEED, probe=needs("npu_swiglu"))
def swiglu_npu(gate: Tensor, up: Tensor) -> Tensor:
    """npu_swiglu of gate and up side by side.

    Joining them is a copy, so forward and backward move about as many bytes as silu and product do apart (12 against 14 times [..,F]),
    in three kernels instead of five, and two tensors are kept for the backward pass instead of three.
    """
    if gate.shape != up.shape or gate.dtype != up.dtype:
        found = f"gate {tuple(gate.shape)} {gate.dtype}, up {tuple(up.shape)} {up.dtype}"
        raise reject("swiglu", found, "one shape and dtype")
    return gateway.fused("npu_swiglu")(torch.cat((gate, up), dim=-1), -1)
