"""Collectives over rows with a start and a wait, so that something can be computed in between: going forward, and going backward."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from llmtrain.parallel.hang.where import Begun
from llmtrain.parallel.ops.pending import Pending, start_gather, start_scatter_sum
from llmtrain.parallel.turns import hand_over


@dataclass
class InFlight(ABC):
    """One collective over `group` that is under way. Differentiable; waited for once.

    The backward pass begins the opposite one in the backward of `wait` and ends it in that of `start`, so what was computed between the
    two going forward is differentiated between them.
    """

    group: dist.ProcessGroup
    hands_over: bool = field(default=True, kw_only=True)
    """Whether the other half of a pair of micro-batches may compute while this is under way (`parallel/turns.py`)."""
    _pending: tuple[Pending, Tensor] | None = field(default=None, init=False)

    def start(self, rows: Tensor) -> Tensor:
        """Send rows; returns the buffer that fills until `wait`."""
        return _Start.apply(rows, self)

    def wait(self, buffer: Tensor) -> Tensor:
        """The rows that arrived, once they have."""
        return _Wait.apply(buffer, self)

    def launch(self, rows: Tensor, *, backward: bool) -> Tensor:
        """Begin one direction. Keeps hold of what is sent until `finish`."""
        rows = rows.contiguous()
        pending = self.begin(rows, backward=backward)
        self._pending = pending, rows
        if self.hands_over:
            hand_over()
        return pending.tensor

    def finish(self) -> Tensor:
        """Wait for the direction that was begun, and return its buffer."""
        if self._pending is None:
            raise RuntimeError("a dispatch handle was waited for twice, or never started")
        buffer = self._pending[0].wait()
        self._pending = None
        return buffer

    @abstractmethod
    def begin(self, rows: Tensor, *, backward: bool) -> Pending:
        """Issue the collective, or its opposite."""


@dataclass
class AllToAll(InFlight):
    """`sent[r]` rows to rank r, `arriving[r]` from it: [sum of sent, W] -> [sum of arriving, W]."""

    sent: list[int]
    arriving: list[int]

    def begin(self, rows: Tensor, *, backward: bool) -> Pending:
        to, of = (self.sent, self.arriving) if backward else (self.arriving, self.sent)
        buffer = rows.new_empty(sum(to), *rows.shape[1:])
        begun = Begun("all_to_all", self.group)
        work = dist.all_to_all_single(buffer, rows, output_split_sizes=to, input_split_sizes=of, group=self.group, async_op=True)
        return Pending(buffer, [begun.by(work)])


@dataclass
class AllGather(InFlight):
    """The rows of all t ranks, one rank after the other: [n, ...] -> [t*n, ...]. The ranks' gradients are partial sums and are added."""

    def begin(self, rows: Tensor, *, backward: bool) -> Pending:
        return (start_scatter_sum if backward else start_gather)(rows, self.group)


@dataclass
class ReduceScatter(InFlight):
    """This rank's rows of the sum over all t ranks: [t*n, ...] -> [n, ...]."""

    def begin(self, rows: Tensor, *, backward: bool) -> Pending:
        return (start_gather if backward else start_scatter_sum)(rows, self.group)


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, flight: InFlight) -> Tensor:
        ctx.flight = flight
        return flight.launch(rows, backward=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:
        return ctx.flight.finish(), None  # begun in the backward of _Wait


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, buffer: Tensor, flight: InFlight) -> Tensor:
        ctx.flight = flight
        flight.finish()
        return buffer.view_as(buffer)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.flight.launch(grad, backward=True)
        return grad, None  # of the buffer's shape, as autograd asks; what counts is on its way to _Start's backward
