"""RMSNorm, rotary embedding, SwiGLU and cross-entropy of the package liger-kernel, where it is installed. Not run on hardware: the calls
are held to the signatures of 0.8.5 and tested on stand-ins that write in place where the package does. So `auto` takes none of them."""

import importlib
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from llmtrain.ops.cross_entropy import IGNORE
from llmtrain.ops.fast_attention import UNMEASURED
from llmtrain.ops.registry import register
from llmtrain.packages import needs

SERVES = {
    "devices": ("cuda",),
    "dtypes": (torch.float32, torch.bfloat16, torch.float16),
    "speed": UNMEASURED,
    "probe": needs("liger_kernel", "liger-kernel"),
}


def _package(name: str) -> Any:
    """A module of its kernels; `liger_kernel.ops` itself would hand out what a variable of the environment chooses."""
    return importlib.import_module(f"liger_kernel.ops.{name}")


@register("rms_norm", "liger", **SERVES)
def rms_norm_liger(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As `rms_norm_reference`: all in fp32 (the package's mode gemma), and no gradient of x written over that of the result, which a
    residual may need (its default)."""
    offset, in_place, row_mode = 0.0, False, None
    return _package("rms_norm").LigerRMSNormFunction.apply(x, weight, eps, offset, "gemma", in_place, row_mode)


@register("rope", "liger", **SERVES)
def rope_liger(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As `rope_reference` for cos and sin whose halves are equal, as those of models are: it reads the first half. They get no gradient."""
    return _Rope.apply(x, cos, sin)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turned(grad, cos, -sin), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The package turns queries and keys in their own memory, as [B,S,H,d]: it gets a copy, and one head of anything as the other."""
    wide = torch.promote_types(x.dtype, cos.dtype)
    own = x.transpose(1, 2).clone(memory_format=torch.contiguous_format).transpose(1, 2)
    other = x.new_zeros(x.shape[0], x.shape[2], 1, x.shape[3]).transpose(1, 2)
    return _package("rope").LigerRopeFunction.apply(own, other, cos.to(wide), sin.to(wide))[0]


@register("swiglu", "liger", **SERVES)
def swiglu_liger(gate: Tensor, up: Tensor) -> Tensor:
    """As `swiglu_reference`, silu rounded to gate's dtype before the product. Gate and up are kept for the backward pass."""
    return _Swiglu.apply(gate, up)


class _Swiglu(torch.autograd.Function):
    """The package's own writes both gradients over gate and up, unseen by autograd: wrong for who else keeps them, and the second time."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        return _package("swiglu").swiglu_forward(gate, up)[2]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return _package("swiglu").swiglu_backward(gate.clone(), up.clone(), grad.contiguous())


@register("cross_entropy", "liger", **SERVES)
def cross_entropy_liger(hidden: Tensor, weight: Tensor, targets: Tensor, *, chunk: int) -> Tensor:
    """As `cross_entropy_chunked`, in chunks of the package's choice: `chunk` is ignored. It waits for the device once, to count targets,
    and reads beyond the logits for a target beyond the vocabulary. The weight's gradient is summed in fp32."""
    weight = weight.to(hidden.dtype)
    if not torch.is_grad_enabled() or not (hidden.requires_grad or weight.requires_grad):
        return _loss(hidden.detach(), weight.detach(), targets)
    return _CrossEntropy.apply(hidden, weight, targets)


def _loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The sum of losses, with the package's gradients if the tensors want some."""
    bias = class_weight = softcap = None
    z_loss, smoothing, return_z_loss = 0.0, 0.0, False
    options = (bias, class_weight, IGNORE, z_loss, smoothing, "sum", softcap, return_z_loss, torch.float32)
    return _package("fused_linear_cross_entropy").LigerFusedLinearCrossEntropyFunction.apply(hidden, weight, targets, *options)[0]


class _CrossEntropy(torch.autograd.Function):
    """The package's gradients are scaled in place, so each of its losses serves one backward pass; a second one computes anew."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight, targets)
        ctx.made = _with_leaves(hidden, weight, targets, ctx.needs_input_grad[1])
        return ctx.made[0].detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        made, ctx.made = ctx.made, None
        loss, leaves = _with_leaves(*ctx.saved_tensors, ctx.needs_input_grad[1]) if made is None else made
        found = torch.autograd.grad(loss, [leaf for leaf in leaves if leaf.requires_grad], grad)
        return found[0] if ctx.needs_input_grad[0] else None, found[1] if ctx.needs_input_grad[1] else None, None


@torch.enable_grad()
def _with_leaves(hidden: Tensor, weight: Tensor, targets: Tensor, weight_wanted: bool) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """The loss of copies that are leaves. Hidden always wants a gradient: without it the package makes none for the weight either."""
    leaves = hidden.detach().requires_grad_(), weight.detach().requires_grad_(weight_wanted)
    return _loss(*leaves, targets), leaves
