"""RMSNorm, rotary embedding, SwiGLU, cross-entropy and the sorting by expert by the Triton kernels of `llmtrain_kernels`, as entries
`triton`."""

import torch
from llmtrain_kernels import triton_pointwise
from torch import Tensor

from llmtrain.ops.cross_entropy import in_chunks
from llmtrain.ops.experts import inverse, sort_by_expert
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


@register("cross_entropy", "triton", **SERVES)
def cross_entropy_triton(hidden: Tensor, weight: Tensor, targets: Tensor, *, chunk: int) -> Tensor:
    """As `cross_entropy_chunked`, without a copy of the logits in fp32. A target beyond the vocabulary gives NaN."""
    return in_chunks(hidden, weight, targets, chunk, _losses)


def _losses(logits: Tensor, target: Tensor, high: torch.dtype, slope: bool) -> tuple[Tensor, Tensor | None]:
    return triton_pointwise.softmax_losses(logits, target, slope=slope), logits if slope else None


@register("permute", "triton", **SERVES)
def permute_triton(x: Tensor, ids: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """As `permute_reference`; its gradient is one pass over the copies."""
    order, counts = sort_by_expert(ids, experts)
    return triton_pointwise.permute(x, order, inverse(order).view(ids.shape)), order, counts


@register("unpermute", "triton", **SERVES)
def unpermute_triton(rows: Tensor, order: Tensor, probs: Tensor) -> Tensor:
    """As `unpermute_reference`, without the rows in the tokens' order; rows themselves are kept for the backward pass."""
    return triton_pointwise.unpermute(rows, inverse(order).view(probs.shape), probs)
