"""The softmax of cross-entropy: losses, and their gradient in place of the logits."""

import torch
from llmtrain_kernels.triton_pointwise.checks import check
from torch import Tensor

BLOCK = 4096


def softmax_losses(logits: Tensor, target: Tensor, *, slope: bool) -> Tensor:
    """-log softmax(logits)[target] of every row, [n] in fp32; with `slope` the logits become d loss / d logits. No autograd.

    logits [n,V] with contiguous rows, target [n] int64; a target outside the vocabulary gives NaN. Raises ValueError for other shapes.
    """
    check("cross_entropy", logits)
    if logits.dim() != 2 or target.shape != logits.shape[:1] or logits.stride(1) != 1:
        raise ValueError(
            f"cross_entropy in Triton: logits {tuple(logits.shape)}, target {tuple(target.shape)}; needed [n,V], contiguous rows, and [n]"
        )
    return softmax_losses_op(logits, target, slope)


@torch.library.custom_op("llmtrain_kernels::triton_softmax_losses", mutates_args=("logits",))
def softmax_losses_op(logits: Tensor, target: Tensor, slope: bool) -> Tensor:
    """The losses."""
    from llmtrain_kernels.triton_pointwise import programs

    losses = logits.new_empty(len(logits), dtype=torch.float32)
    if logits.numel():
        block = min(BLOCK, 1 << (logits.shape[1] - 1).bit_length())
        args = (logits, target.contiguous(), losses, logits.stride(0), logits.shape[1])
        programs.softmax_losses[(len(logits),)](*args, SLOPE=slope, BLOCK=block, num_warps=max(1, block // 512))
    return losses


@softmax_losses_op.register_fake
def _(logits: Tensor, target: Tensor, slope: bool) -> Tensor:
    return logits.new_empty(len(logits), dtype=torch.float32)
