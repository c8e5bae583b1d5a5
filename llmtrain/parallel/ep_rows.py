"""Rows on their way to the ranks that hold their experts, and results back: what all dispatchers that use all-to-alls share."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from llmtrain.model.experts import Dispatched
from llmtrain.ops.experts import inverse
from llmtrain.parallel.hang.where import device_wait, recorded
from llmtrain.parallel.ops.in_flight import AllToAll


class Leaving(NamedTuple):
    """Rows that were sent."""

    flight: AllToAll
    buffer: Tensor
    """Filled when the flight has been waited for."""


@dataclass(frozen=True)
class Shares:
    """How many rows go where in `group`, whose ranks hold experts in equal runs, one rank after the other."""

    group: dist.ProcessGroup
    sent: list[int]
    """Rows to each rank."""
    arriving: list[int]
    """Rows from each rank; they sum to M."""
    received: Tensor
    """[ranks, experts held here] int64: rows from each rank for each expert."""

    @classmethod
    def of(cls, counts: Tensor, group: dist.ProcessGroup) -> "Shares":
        """From this rank's rows for each of the group's experts [E] int64; the ranks tell each other, and the host waits for it."""
        received = torch.empty_like(counts)
        with recorded("all_to_all", group):
            dist.all_to_all_single(received, counts, group=group)
        by_rank = torch.stack((received, counts)).view(2, group.size(), -1)
        with device_wait():
            arriving, sent = by_rank.sum(2).tolist()
        return cls(group, sent, arriving, by_rank[0])

    @property
    def counts(self) -> Tensor:
        """[experts held here] int64: rows that arrive for each."""
        return self.received.sum(0)

    def send(self, rows: Tensor) -> Leaving:
        """Begin to send rows [n,W], sorted by expert and so by rank."""
        flight = AllToAll(self.group, self.sent, self.arriving)
        return Leaving(flight, flight.start(rows))

    def arrived(self, leaving: Leaving) -> tuple[Tensor, Tensor]:
        """Rows [M,W] sorted by expert, then by source rank, then as they were sent; and for `send_back` where in the order of their arrival
        they were [M]."""
        rows = leaving.flight.wait(leaving.buffer)
        held = torch.arange(self.received.shape[1], device=rows.device).repeat(len(self.received))
        by_expert = held.repeat_interleave(self.received.flatten(), output_size=len(rows)).argsort(stable=True)
        back = inverse(by_expert)
        return _Reorder.apply(rows, by_expert, back), back

    def send_back(self, results: Tensor, back: Tensor) -> Leaving:
        """Begin to send results [M,W'], in the order in which `arrived` gave the rows."""
        flight = AllToAll(self.group, self.arriving, self.sent)
        return Leaving(flight, flight.start(_Reorder.apply(results, back, inverse(back))))


class Return(NamedTuple):
    """What `wait` leaves for `combine_start`."""

    sent: Any
    """What `start` gave."""
    back: Tensor


class ThroughShares:
    """What a dispatcher does between `start`, whose handle has `shares` and `leaving`, and `combine_wait`, which gets that handle back."""

    def wait(self, handle: Any) -> Dispatched:
        rows, back = handle.shares.arrived(handle.leaving)
        return Dispatched(rows, handle.shares.counts, Return(handle, back))

    def combine_start(self, rows: Tensor, combine: Return) -> tuple[Leaving, Any]:
        return combine.sent.shares.send_back(rows, combine.back), combine.sent


class _Reorder(torch.autograd.Function):
    """rows[order]; the gradient gathers too, where that of indexing would add rows up."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return rows.index_select(0, order)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return grad.index_select(0, inverse), None, None
