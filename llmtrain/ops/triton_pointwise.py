"""RMSNorm, rotary embedding and SwiGLU by the Triton kernels of `llmtrain_kernels`, as entries `triton`."""

import torch
from llmtrain_kernels import triton_pointwise
from torch import Tensor

from llmtrain.ops.fast_attention import UNMEASURED
from llmtrain.ops.registry import Call, register


def _supports(call: Call) -> str | None:
    return triton_pointwise.unavailable(call.device)


SERVES = {
    "devices": ("cuda", "cpu"),
    "dtypes": (torch.float32, torch.bfloat16, torch.float16),
    "speed": UNMEASURED,
    "supports": _supports,
}


@register("rms_norm", "triton", **SERVES)
def rms_norm_triton(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As `rms_norm_reference`, in one pass over x each way; rows up to 16,384 wide."""
    return triton_pointwise.rms_norm(x, weight, eps)


@register("rope", "triton", **SERVES)
def rope_triton(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As `rope_reference`, in one pass over x; cos and sin get no gradient."""
    return triton_pointwise.rope(x, cos, sin)


@register("swiglu", "triton", **SERVES)
def swiglu_triton(gate: Tensor, up: Tensor) -> Tensor:
    """As `swiglu_reference`, keeping gate and up alone for the backward pass."""
    return triton_pointwise.swiglu(gate, up)
