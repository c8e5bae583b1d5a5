"""A collective over the sequence and the matmul beside it, as one op: all_gather_matmul and matmul_reduce_scatter.

While one piece of the sequence is multiplied, another one is sent (Pangu Ultra's MC2, arXiv 2504.07866), forward and backward. For the
backward pass each rank keeps its own part of the input and gathers it again, as Megatron does: S/t positions instead of S.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from llmtrain.parallel.ops.choice import IMPLEMENTATIONS
from llmtrain.parallel.ops.implementations import Chunked
from llmtrain.parallel.ops.pieces import Pieces
from llmtrain.parallel.ops.sequence import local_length


def all_gather_matmul(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None = None,
    *,
    group: dist.ProcessGroup,
    chunks: int = 1,
    ordered: bool = True,
    implementation: str = "chunked",
) -> list[Tensor]:
    """x [B,S/t,D] gathered over the t ranks of `group`, times each of `weights` [F,D] plus its bias [F]: a list of [B,S,F].

    Gradients: of x the sum over ranks, of weights and biases this rank's own.

    Args:
        chunks: pieces of the sequence that are sent one by one; 1 overlaps nothing in the forward pass.
        ordered: False gives rows [B*S,F] in the order in which they arrive, which `matmul_reduce_scatter` undoes; saves a copy.
        implementation: a key of IMPLEMENTATIONS.
    """
    how = _how(implementation, x.shape[0], x.shape[1], group, chunks=chunks, ordered=ordered)
    rows = how.pieces.local_rows(x if ordered else x.flatten(0, 1)[None])
    products = _GatherMatmul.apply(how, rows, *weights, *(biases or [None] * len(weights)))
    return [how.pieces.to_sequence(product) for product in products] if ordered else list(products)


def matmul_reduce_scatter(
    x: Tensor,
    weight: Tensor,
    *,
    group: dist.ProcessGroup,
    chunks: int = 1,
    batch: int | None = None,
    implementation: str = "chunked",
) -> Tensor:
    """x [B,S,...] (F elements per position) times `weight` [D,F], summed over the t ranks of `group`: this rank's [B,S/t,D].

    With `batch` = B, x is rows [B*S,F] as `all_gather_matmul` gave with `ordered=False` and the same chunks. Gradients: of x and of the
    weight this rank's own. Raises UserError if t does not divide S.
    """
    if batch is None:
        how = _how(implementation, x.shape[0], local_length(x.shape[1], group), group, chunks=chunks, ordered=True)
        return how.pieces.from_local_rows(_MatmulScatter.apply(how, how.pieces.whole_rows(x), weight))
    how = _how(implementation, batch, x.shape[0] // (batch * group.size()), group, chunks=chunks, ordered=False)
    return _MatmulScatter.apply(how, x, weight).view(batch, -1, weight.shape[0])


def _how(name: str, batch: int, length: int, group: dist.ProcessGroup, *, chunks: int, ordered: bool) -> Chunked:
    """The implementation. Where order does not matter, batch rows are one long row, whose pieces need no copies."""
    batch, length = (batch, length) if ordered else (1, batch * length)
    return IMPLEMENTATIONS[name](Pieces(batch=batch, length=length, ranks=group.size(), chunks=chunks), group)


class _GatherMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, how: Chunked, rows: Tensor, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        weights, biases = tensors[: len(tensors) // 2], tensors[len(tensors) // 2 :]
        products, _ = how.gather_mm(rows, [weight.t() for weight in weights])
        for product, bias in zip(products, biases):
            if bias is not None:
                product.add_(bias)
        ctx.how = how
        ctx.save_for_backward(rows, *weights)
        return tuple(products)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, *weights = ctx.saved_tensors
        _, needs_rows, *needs = ctx.needs_input_grad
        needs_weight, needs_bias = needs[: len(weights)], needs[len(weights) :]
        # Rows arrive while their gradient is computed; that is sent while the weights' gradients are computed.
        gathered = ctx.how.start_gather(rows) if any(needs_weight) else None
        sent = ctx.how.start_mm_scatter(list(zip(grads, weights))) if needs_rows else None
        whole = gathered.wait() if gathered is not None else None
        of_weights = [grad.t() @ whole if needed else None for grad, needed in zip(grads, needs_weight)]
        of_biases = [grad.sum(0) if needed else None for grad, needed in zip(grads, needs_bias)]
        return None, sent.wait() if sent is not None else None, *of_weights, *of_biases


class _MatmulScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, how: Chunked, rows: Tensor, weight: Tensor) -> Tensor:
        ctx.how = how
        ctx.save_for_backward(rows, weight)
        return how.start_mm_scatter([(rows, weight.t())]).wait()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, Tensor | None]:
        rows, weight = ctx.saved_tensors
        needs_weight = ctx.needs_input_grad[2]
        (of_rows,), gathered = ctx.how.gather_mm(grad, [weight], keep=needs_weight)
        return None, of_rows, gathered.t() @ rows if needs_weight else None
