"""Routed experts: the seam between a router and whatever moves rows to experts and computes them."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
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
        """Begin to send x [N,W] to the experts ids [N,k] (global numbers); probs [N,k] weigh the results. The number of experts as an id
        means that this copy goes nowhere and brings nothing back."""

    def wait(self, handle: Any) -> Dispatched:
        """The rows for the experts held here."""

    def combine_start(self, rows: Tensor, combine: Any) -> Any:
        """Begin to send the results rows [M,W'] back, in the order in which `wait` gave the rows."""

    def combine_wait(self, handle: Any) -> Tensor:
        """[N,W']: per token the sum of its experts' results times probs."""


class Meanwhile:
    """Work that can be done while rows travel: whoever sends them calls it once they have left; `result` does it at the latest."""

    def __init__(self, work: Callable[[], Tensor]):
        self._work, self._result = work, None

    def __call__(self) -> None:
        if self._result is None:
            self._result = self._work()

    def result(self) -> Tensor:
        """What the work gives."""
        self()
        return self._result


def sort_rows(ops: Any, x: Tensor, ids: Tensor, experts: int, *, drops: bool) -> tuple[Tensor, Tensor, Tensor]:
    """As the op permute, x [N,W] and ids [N,k] -> rows [M,W], order [N*k], counts [experts]. With `drops`, copies may go nowhere and are
    none of the rows."""
    if not drops:
        return ops.permute(x, ids, experts)
    rows, order, counts = ops.permute(x, ids, experts + 1)
    counts = counts[:experts]
    return rows[: int(counts.sum())], order, counts


def unsort_rows(ops: Any, rows: Tensor, order: Tensor, probs: Tensor) -> Tensor:
    """As the op unpermute, for the rows [M,W] of `sort_rows`: [N,W]. Copies that went nowhere count as zeros."""
    missing = len(order) - len(rows)
    return ops.unpermute(F.pad(rows, (0, 0, 0, missing)) if missing else rows, order, probs)


@dataclass
class LocalDispatcher:
    """All experts on this rank: sorting rows is all there is to do, so `start` does it and `wait` has nothing to wait for."""

    experts: int
    ops: Any
    drops: bool = False
    """Whether ids may send copies nowhere."""

    def start(self, x: Tensor, probs: Tensor, ids: Tensor) -> Dispatched:
        rows, order, counts = sort_rows(self.ops, x, ids, self.experts, drops=self.drops)
        return Dispatched(rows, counts, (order, probs))

    def wait(self, handle: Dispatched) -> Dispatched:
        return handle

    def combine_start(self, rows: Tensor, combine: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        return rows, *combine

    def combine_wait(self, handle: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        return unsort_rows(self.ops, *handle)


class Experts(nn.Module):
    """E feed-forward networks over rows sorted by expert: [M,D], counts [E] -> [M,D].

    Weights are stacked, [E,D,F] and [E,F,D]; expert e of the stack is logical expert e of those held here. With `bias`, [E,F] and [E,D] are
    added to each product.
    """

    def __init__(self, experts: int, hidden: int, width: int, *, ops, activation: Literal["swiglu", "gelu"] = "swiglu", bias: bool = False):
        super().__init__()
        self.ops = ops
        self.gate_proj = nn.Parameter(torch.empty(experts, hidden, width)) if activation == "swiglu" else None
        self.up_proj = nn.Parameter(torch.empty(experts, hidden, width))
        self.down_proj = nn.Parameter(torch.empty(experts, width, hidden))
        self.gate_bias = nn.Parameter(torch.empty(experts, width)) if bias and activation == "swiglu" else None
        self.up_bias = nn.Parameter(torch.empty(experts, width)) if bias else None
        self.down_bias = nn.Parameter(torch.empty(experts, hidden)) if bias else None

    def weights(self) -> tuple[Tensor | None, Tensor, Tensor]:
        """The stacks of gate (None without one), up and down projections, as plain tensors: where they are sharded, this is replaced."""
        return self.gate_proj, self.up_proj, self.down_proj

    def biases(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Those of the same, likewise."""
        return self.gate_bias, self.up_bias, self.down_bias

    def forward(self, rows: Tensor, counts: Tensor) -> Tensor:
        gate, up, down = (
            None if weight is None else partial(self._product, weight=weight, bias=bias, counts=counts)
            for weight, bias in zip(self.weights(), self.biases())
        )
        return down(self.activate(up(rows)) if gate is None else self.activate(gate(rows), up(rows)))

    def activate(self, *expanded: Tensor) -> Tensor:
        """What gate, if there is one, and up projections give, [M,F] each -> [M,F]."""
        return self.ops.gelu(*expanded) if len(expanded) == 1 else self.ops.swiglu(*expanded)

    def _product(self, rows: Tensor, *, weight: Tensor, bias: Tensor | None, counts: Tensor) -> Tensor:
        out = self.ops.grouped_mm(rows, weight, counts)
        return out if bias is None else out + bias.repeat_interleave(counts, 0, output_size=len(rows))


class RoutedExperts:
    """Called with x [N,D], probs [N,k], ids [N,k] -> [N,D]: sum over k of probs * expert(x).

    `meanwhile`, if given, is called while rows travel; an implementation may also leave it alone. A fused implementation is another
    callable of the same arguments. Not a module: the layer that has it owns the experts.
    """

    def __init__(self, experts: nn.Module, dispatcher: Dispatcher):
        self.experts, self.dispatcher = experts, dispatcher

    def __call__(self, x: Tensor, probs: Tensor, ids: Tensor, *, meanwhile: Meanwhile | None = None) -> Tensor:
        leaving = self.dispatcher.start(x, probs, ids)
        if meanwhile is not None:
            meanwhile()
        arrived = self.dispatcher.wait(leaving)
        results = self.experts(arrived.rows, arrived.counts)
        return self.dispatcher.combine_wait(self.dispatcher.combine_start(results, arrived.combine))
