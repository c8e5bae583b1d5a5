"""Cross-entropy fused with the head: hidden states in, the sum of losses out."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from llmtrain.ops.registry import register

IGNORE = -100


@register("cross_entropy", "reference", speed=0)
def cross_entropy_reference(hidden: Tensor, weight: Tensor, targets: Tensor, *, chunk: int = 0) -> Tensor:
    """Sum of -log softmax(hidden @ weight.T)[target] with all N x V logits at once; `chunk` is ignored.

    hidden [N,D], weight [V,D], targets [N] int64, -100 for no target. Logits in hidden's dtype, softmax in fp32 (fp64 for fp64).
    """
    logits = F.linear(hidden, weight.to(hidden.dtype))
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets, ignore_index=IGNORE, reduction="sum")


@register("cross_entropy", "chunked", speed=1)
def cross_entropy_chunked(hidden: Tensor, weight: Tensor, targets: Tensor, *, chunk: int) -> Tensor:
    """The same with the logits of `chunk` rows at a time; gradients are computed along with the loss and scaled in the backward pass.

    The weight's gradient is summed in fp32 when the weight is narrower. Raises ValueError for a chunk below 1.
    """
    return in_chunks(hidden, weight, targets, chunk, _softmax)


Losses = Callable[[Tensor, Tensor, torch.dtype, bool], tuple[Tensor, Tensor | None]]
"""(logits [n,V], which may be overwritten, target [n], computing dtype, want gradients) -> losses [n], d loss / d logits or None."""


def in_chunks(hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int, losses: Losses) -> Tensor:
    """`cross_entropy_chunked` with the losses of a chunk's logits computed by `losses`."""
    if chunk < 1:
        raise ValueError(f"cross_entropy: chunk={chunk}; train.loss_chunk is a number of rows, at least 1")
    if hidden.shape[-1] != weight.shape[-1] or hidden.shape[:-1] != targets.shape:
        shapes = f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}, targets {tuple(targets.shape)}"
        raise ValueError(f"cross_entropy: {shapes}; needed [N,D], [V,D], [N]")
    if not torch.is_grad_enabled() or not (hidden.requires_grad or weight.requires_grad):
        return _run(hidden, weight, targets, chunk, losses, (False, False)).loss
    return _Chunked.apply(hidden, weight, targets, chunk, losses)


class _Result(NamedTuple):
    loss: Tensor
    hidden: Tensor | None
    weight: Tensor | None


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int, losses: Losses) -> Tensor:
        result = _run(hidden, weight, targets, chunk, losses, ctx.needs_input_grad[:2])
        ctx.save_for_backward(hidden, weight, targets)
        ctx.chunk, ctx.losses, ctx.result = chunk, losses, result
        return result.loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        # The first pass hands its gradients over, scaled in place: no second copy of [V,D]. A second pass over the graph computes anew.
        result, ctx.result = ctx.result, None
        if result is None:
            result = _run(*ctx.saved_tensors, ctx.chunk, ctx.losses, ctx.needs_input_grad[:2])
        dtypes = [x.dtype for x in ctx.saved_tensors[:2]]
        scaled = [None if x is None else x.mul_(grad.to(x.dtype)).to(dtype) for x, dtype in zip(result[1:], dtypes)]
        return scaled[0], scaled[1], None, None, None


@torch.no_grad()
def _run(hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int, losses: Losses, wanted: tuple[bool, bool]) -> _Result:
    """Loss and unscaled gradients. On the CPU, rows without a target are left out; elsewhere finding them would stall the device."""
    kept = _rows_with_target(targets) if hidden.device.type == "cpu" else None
    if kept is None:
        return _run_rows(hidden, weight, targets, chunk, losses, wanted)
    loss, rows, grad_weight = _run_rows(hidden[kept], weight, targets[kept], chunk, losses, wanted)
    grad_hidden = None if rows is None else torch.zeros_like(hidden).index_copy_(0, kept, rows)
    return _Result(loss, grad_hidden, grad_weight)


def _rows_with_target(targets: Tensor) -> Tensor | None:
    kept = (targets != IGNORE).nonzero()[:, 0]
    return None if len(kept) == len(targets) else kept


def _run_rows(hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int, losses: Losses, wanted: tuple[bool, bool]) -> _Result:
    high = torch.promote_types(hidden.dtype, torch.float32)
    matrix = weight.to(hidden.dtype)
    loss = torch.zeros((), dtype=high, device=hidden.device)
    grad_hidden = torch.empty_like(hidden) if wanted[0] else None
    grad_weight = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32)) if wanted[1] else None
    buffer = hidden.new_empty(min(chunk, len(hidden)), len(weight))  # [chunk,V]
    for start in range(0, len(hidden), chunk):
        rows, target = hidden[start : start + chunk], targets[start : start + chunk]
        logits = torch.mm(rows, matrix.t(), out=buffer[: len(rows)])
        valid = target != IGNORE
        each, slope = losses(logits, target.clamp(min=0), high, any(wanted))
        loss += torch.where(valid, each, 0.0).sum()
        if slope is None:
            continue
        # Rows without a target are cleared in the [n,D] matrices, not in the [n,V] one.
        if grad_hidden is not None:
            torch.mm(slope, matrix, out=grad_hidden[start : start + chunk])
            grad_hidden[start : start + chunk].masked_fill_(~valid[:, None], 0.0)
        if grad_weight is not None:
            add_product(grad_weight, slope.t(), rows.masked_fill(~valid[:, None], 0.0))
    return _Result(loss, grad_hidden, grad_weight)


def _softmax(logits: Tensor, target: Tensor, high: torch.dtype, slope: bool) -> tuple[Tensor, Tensor | None]:
    """Losses [n] and, if wanted, d loss / d logits [n,V] in the logits' dtype; the logits are overwritten."""
    wide = logits.to(high)  # the same tensor for fp32 and fp64
    chosen = wide.gather(1, target[:, None])
    top = wide.amax(1, keepdim=True)
    probabilities = torch.softmax(wide, dim=1, out=wide)
    # One fused softmax gives the log-sum-exp too: the largest probability is exp(top - lse). Faster on the CPU than logsumexp.
    losses = (top - probabilities.amax(1, keepdim=True).log() - chosen)[:, 0]
    if not slope:
        return losses, None
    probabilities.scatter_add_(1, target[:, None], -torch.ones_like(chosen))
    return losses, probabilities if wide.dtype == logits.dtype else logits.copy_(probabilities)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, which may be of a narrower dtype."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total.add_(a @ b)
