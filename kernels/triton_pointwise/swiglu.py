"""SwiGLU (arXiv 2002.05202)."""

from typing import Any

import torch
from llmtrain_kernels.triton_pointwise.checks import check
from torch import Tensor

BLOCK = 1024


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, [..,F] each, in fp32, returned in gate's dtype. Only gate and up are kept for the backward pass."""
    check("swiglu", gate, up)
    if gate.shape != up.shape:
        raise ValueError(f"swiglu in Triton: gate {tuple(gate.shape)}, up {tuple(up.shape)}; needed equal shapes")
    return swiglu_op(gate, up)


@torch.library.custom_op("llmtrain_kernels::triton_swiglu", mutates_args=())
def swiglu_op(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    from llmtrain_kernels.triton_pointwise.programs import swiglu_forward

    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    if gate.numel():
        swiglu_forward[(-(-gate.numel() // BLOCK),)](gate, up, out, gate.numel(), BLOCK=BLOCK)
    return out


@swiglu_op.register_fake
def _(gate: Tensor, up: Tensor) -> Tensor:
    return gate.new_empty(gate.shape)


@torch.library.custom_op("llmtrain_kernels::triton_swiglu_backward", mutates_args=())
def swiglu_backward_op(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up."""
    from llmtrain_kernels.triton_pointwise.programs import swiglu_backward

    grad, gate, up = (x.contiguous() for x in (grad, gate, up))
    grads = torch.empty_like(gate), torch.empty_like(up)
    if gate.numel():
        swiglu_backward[(-(-gate.numel() // BLOCK),)](grad, gate, up, *grads, gate.numel(), BLOCK=BLOCK)
    return grads


@swiglu_backward_op.register_fake
def _(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


def _keep(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    return swiglu_backward_op(grad, *ctx.saved_tensors)


swiglu_op.register_autograd(_backward, setup_context=_keep)
