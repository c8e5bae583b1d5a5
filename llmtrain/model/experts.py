"""Routed experts: the seam between a router and whatever moves rows to experts and computes them."""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn


class Dispatched(NamedTuple):
    """Rows that have arrived at the experts held here."""

    rows: Tensor
    """[M,W], sorted by expert."""
    counts: Tensor
    """[E] int64, rows of each local expert; they sum to M."""
    combine: Any
    """What `combine_start` needs to send results back."""


@runtime_checkable
class Dispatcher(Protocol):
    """Moves rows of any width W to their experts and results back.

    Each way is a start that returns a handle at once and a wait that turns the handle into the result, so that a schedule may
    compute in between. Gradients flow through both ways; a handle is waited for exactly once.
    """

    def start(self, x: Tensor, probs: Tensor, ids: Tensor) -> Any:
        """Begin to send x [N,W] to the experts ids [N,k] (global numbers); probs [N,k] weigh the results."""

    def wait(self, handle: Any) -> Dispatched:
        """The rows for the experts held here."""

    def combine_start(self, rows: Tensor, combine: Any) -> Any:
        """Begin to send the results rows [M,W'] back, in the order in which `wait` gave the rows."""

    def combine_wait(self, handle: Any) -> Tensor:
        """[N,W']: per token the sum of its experts' results times probs."""


@dataclass
class LocalDispatcher:
    """All experts on this rank: sorting rows is all there is to do, so `start` does it and `wait` has nothing to wait for."""

    experts: int
    ops: Any

    def start(self, x: Tensor, probs: Tensor, ids: Tensor) -> Dispatched:
        rows, order, counts = self.ops.permute(x, ids, self.experts)
        return Dispatched(rows, counts, (order, probs))

    def wait(self, handle: Dispatched) -> Dispatched:
        return handle

    def combine_start(self, rows: Tensor, combine: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        return rows, *combine

    def combine_wait(self, handle: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        return self.ops.unpermute(*handle)


class Experts(nn.Module):
    """E feed-forward networks over rows sorted by expert: [M,D], counts [E] -> [M,D].

    Weights are stacked, [E,D,F] and [E,F,D]; expert e of the stack is logical expert e of those held here.
    """

    def __init__(self, experts: int, hidden: int, width: int, *, ops, activation: Literal["swiglu", "gelu"] = "swiglu"):
        super().__init__()
        self.ops = ops
        self.gate_proj = nn.Parameter(torch.empty(experts, hidden, width)) if activation == "swiglu" else None
        self.up_proj = nn.Parameter(torch.empty(experts, hidden, width))
        self.down_proj = nn.Parameter(torch.empty(experts, width, hidden))

    def weights(self) -> tuple[Tensor | None, Tensor, Tensor]:
        """The stacks of gate (None without one), up and down projections, as plain tensors: where they are sharded, this is replaced."""
        return self.gate_proj, self.up_proj, self.down_proj

    def forward(self, rows: Tensor, counts: Tensor) -> Tensor:
        gate_proj, up_proj, down_proj = self.weights()
        up = self.ops.grouped_mm(rows, up_proj, counts)
        inner = self.ops.gelu(up) if gate_proj is None else self.ops.swiglu(self.ops.grouped_mm(rows, gate_proj, counts), up)
        return self.ops.grouped_mm(inner, down_proj, counts)


class RoutedExperts:
    """Called with x [N,D], probs [N,k], ids [N,k] -> [N,D]: sum over k of probs * expert(x).

    A schedule that interleaves two micro-batches calls `dispatcher` and `experts` itself instead. A fused implementation is
    another callable of the same arguments. Not a module: the layer that has it owns the experts.
    """

    def __init__(self, experts: nn.Module, dispatcher: Dispatcher):
        self.experts, self.dispatcher = experts, dispatcher

    def __call__(self, x: Tensor, probs: Tensor, ids: Tensor) -> Tensor:
        arrived = self.dispatcher.wait(self.dispatcher.start(x, probs, ids))
        results = self.experts(arrived.rows, arrived.counts)
        return self.dispatcher.combine_wait(self.dispatcher.combine_start(results, arrived.combine))
