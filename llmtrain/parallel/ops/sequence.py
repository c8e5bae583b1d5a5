"""Gathering a sequence from ranks, and its opposite: summing partial results and giving each rank its part of the sequence."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from llmtrain.errors import UserError
from llmtrain.parallel.ops.pending import start_gather, start_scatter_sum
from llmtrain.parallel.ops.pieces import Pieces


def all_gather_sequence(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[B,S/t,D] on each of the t ranks of `group` -> [B,S,D] on all; backward, the ranks' gradients are partial sums and are added."""
    pieces = Pieces(batch=x.shape[0], length=x.shape[1], ranks=group.size(), chunks=1)
    return pieces.to_sequence(gathered_rows(pieces.local_rows(x), group))


def reduce_scatter_sequence(partial: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[B,S,D], of which each of the t ranks of `group` has a summand -> the sum, [B,S/t,D] on each; backward, the gradients are gathered.

    Raises UserError if t does not divide S.
    """
    pieces = Pieces(batch=partial.shape[0], length=local_length(partial.shape[1], group), ranks=group.size(), chunks=1)
    return pieces.from_local_rows(summed_rows(pieces.whole_rows(partial), group))


def local_length(length: int, group: dist.ProcessGroup) -> int:
    """S/t; raises UserError if it is not whole."""
    if length % group.size():
        raise UserError(
            f"a sequence of {length} tokens cannot be shared by parallel.tp {group.size()}; change train.seq_len or parallel.tp"
        )
    return length // group.size()


def gathered_rows(rows: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[n,...] on each of the t ranks -> [t*n,...] on all, rank by rank; backward, the gradients are partial sums and are added."""
    return _Gather.apply(rows, group)


def summed_rows(rows: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[t*n,...], of which each rank has a summand -> this rank's [n,...] of the sum; backward, the gradients are gathered."""
    return _ScatterSum.apply(rows, group)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return start_gather(rows, group).wait()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return start_scatter_sum(grad, ctx.group).wait(), None


class _ScatterSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return start_scatter_sum(rows, group).wait()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return start_gather(grad, ctx.group).wait(), None
