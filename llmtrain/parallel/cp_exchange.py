"""Collectives of context parallelism, with their gradients. One message each way; the sequence dim comes first, as collectives want it.

L local places of a row, S positions of the whole row, n ranks, B rows, F numbers of a token.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from llmtrain.layout.sequence import Partition
from llmtrain.parallel.hang.where import recorded
from llmtrain.parallel.ops.pending import start_gather, start_scatter_sum


class Order:
    """A Partition's index tensors on one device: from the ranks' joined places [n*L, B, F] to whole rows [S, B, F] and back."""

    def __init__(self, partition: Partition, device: torch.device):
        joined = torch.from_numpy(partition.sources).permute(0, 2, 1).flatten(0, 1).to(device)  # [n*L, B]
        self.ranks, self.length = partition.cp, partition.local_length
        self.padding = joined < 0 if partition.padding_share else None
        self.sources = joined.clamp_min(0)
        self.places = torch.from_numpy(partition.places).T.contiguous().to(device)  # [S, B]
        self.rows = torch.arange(joined.shape[1], device=device)

    def whole(self, joined: Tensor) -> Tensor:
        """[n*L, B, ...] -> [S, B, ...]; padding is dropped."""
        return joined[self.places, self.rows]

    def joined(self, whole: Tensor, fill: float = 0) -> Tensor:
        """[S, B, ...] -> [n*L, B, ...], `fill` where there is padding."""
        found = whole[self.sources, self.rows]
        if self.padding is not None:
            found[self.padding] = fill
        return found

    def local(self, whole: Tensor, rank: int, fill: float = 0) -> Tensor:
        """[S, B, ...] -> [L, B, ...] of one rank."""
        here = slice(rank * self.length, (rank + 1) * self.length)
        found = whole[self.sources[here], self.rows]
        if self.padding is not None:
            found[self.padding[here]] = fill
        return found


def all_gather(local: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[L, ...] -> [n*L, ...], the ranks' tensors one after the other."""
    return start_gather(local, group).wait()


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor, order: Order, group: dist.ProcessGroup) -> Tensor:
        ctx.order, ctx.group = order, group
        return order.whole(all_gather(local, group))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:
        return start_scatter_sum(ctx.order.joined(grad), ctx.group).wait(), None, None


def gather_rows(local: Tensor, order: Order, group: dist.ProcessGroup) -> Tensor:
    """[L, B, F] of every rank -> whole rows [S, B, F] on every rank. Backward: each rank's gradients summed and scattered."""
    return _GatherRows.apply(local, order, group)


def _all_to_all(sent: Tensor, group: dist.ProcessGroup) -> Tensor:
    received = torch.empty_like(sent)
    with recorded("all_to_all", group):
        dist.all_to_all_single(received, sent, group=group)
    return received


def _to_heads(x: Tensor, order: Order, group: dist.ProcessGroup) -> Tensor:
    received = _all_to_all(x.movedim(2, 0).contiguous(), group)  # [n, L, B, F]
    return order.whole(received.flatten(0, 1))


def _to_sequence(x: Tensor, order: Order, group: dist.ProcessGroup) -> Tensor:
    received = _all_to_all(order.joined(x), group)  # [n*L, B, F]
    return received.unflatten(0, (order.ranks, order.length)).movedim(0, 2)


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, there: Callable, back: Callable, order: Order, group: dist.ProcessGroup) -> Tensor:
        ctx.back, ctx.order, ctx.group = back, order, group
        return there(x, order, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:
        return ctx.back(grad, ctx.order, ctx.group), None, None, None, None


def sequence_to_heads(x: Tensor, order: Order, group: dist.ProcessGroup) -> Tensor:
    """Local places and all heads [L, B, n, F], F numbers for each rank's heads -> whole rows of this rank's heads [S, B, F]."""
    return _Exchange.apply(x, _to_heads, _to_sequence, order, group)


def heads_to_sequence(x: Tensor, order: Order, group: dist.ProcessGroup) -> Tensor:
    """Whole rows of this rank's heads [S, B, F] -> local places of all heads [L, B, n, F], zeros in padding."""
    return _Exchange.apply(x, _to_sequence, _to_heads, order, group)
