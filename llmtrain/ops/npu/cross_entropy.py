"""Cross-entropy fused with the head: `chunked`, its softmax by npu_cross_entropy_loss."""

import torch
from torch import Tensor

from llmtrain.ops.cross_entropy import in_chunks
from llmtrain.ops.npu import gateway
from llmtrain.ops.npu.gateway import DTYPES, NAME, SPEED, needs
from llmtrain.ops.registry import register


@register(
    "cross_entropy",
    NAME,
    devices=("npu",),
    dtypes=DTYPES,
    speed=SPEED,
    probe=needs("npu_cross_entropy_loss", "npu_cross_entropy_loss_backward"),
)
def cross_entropy_npu(hidden: Tensor, weight: Tensor, targets: Tensor, *, chunk: int) -> Tensor:
    """As `cross_entropy_chunked`."""
    return in_chunks(hidden, weight, targets, chunk, _losses)


def _losses(logits: Tensor, target: Tensor, high: torch.dtype, slope: bool) -> tuple[Tensor, Tensor | None]:
    """Losses [n] and, if wanted, d loss / d logits [n,V] in the logits' dtype, for targets that are all in the vocabulary.

    In fp32: the operator keeps log-probabilities in its input's dtype, which in bf16 would be off by percents. Reduced by us: it takes a
    negative ignore_index, such as -100, for none.
    """
    loss, log_probs, *_ = gateway.fused("npu_cross_entropy_loss")(logits.to(high), target, None, "none")
    if not slope:
        return loss, None
    grad = gateway.fused("npu_cross_entropy_loss_backward")(torch.ones_like(loss), log_probs, target, None, None, None, "none")
    return loss, grad.to(logits.dtype)
