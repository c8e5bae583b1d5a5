"""Experts that do not stand in the slots of their own numbers: tokens find them by a table, and whole experts move between ranks.

Slots are those of `layout.placement`. Routers, capacities and counts know experts by their own numbers alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from llmtrain.layout.placement import Route
from llmtrain.model.experts import Dispatched, Dispatcher
from llmtrain.model.moe import MoE
from llmtrain.parallel.ep import SplitExperts
from llmtrain.parallel.ep_fused import FusedExperts
from llmtrain.parallel.hang.where import recorded


@dataclass
class PlacedDispatcher:
    """Any dispatcher, given the slots of experts where it expects their numbers."""

    inner: Dispatcher
    slots: Tensor
    """[E+1] int64: the slot of each expert, and E, for none, as it is."""

    def start(self, x: Tensor, probs: Tensor, ids: Tensor) -> Any:
        return self.inner.start(x, probs, self.slots[ids])

    def wait(self, handle: Any) -> Dispatched:
        return self.inner.wait(handle)

    def combine_start(self, rows: Tensor, combine: Any) -> Any:
        return self.inner.combine_start(rows, combine)

    def combine_wait(self, handle: Any) -> Tensor:
        return self.inner.combine_wait(handle)


def place_by_table(layer: MoE) -> Tensor:
    """Let the tokens of `layer`, whose experts `apply_ep` has shared out, find them by a table [E+1], which is returned: expert e stands in
    slot table[e]. Whoever moves experts changes it in place."""
    slots = torch.arange(layer.count + 1, device=layer.router.weight.device)
    routed = layer.routed
    while isinstance(routed, SplitExperts):
        routed = routed.inner
    if isinstance(routed, FusedExperts):
        routed.slots = slots
    else:
        routed.dispatcher = PlacedDispatcher(routed.dispatcher, slots)
    return slots


@torch.no_grad()
def move_rows(stack: Tensor, route: Route, groups: Sequence[dist.ProcessGroup]) -> None:
    """Move whole experts between the ranks' stacks [rows,..] as `route` says, in place; `groups` are the ranks along each of its hops.

    All ranks of the groups call it together. What moves exists twice for a while.
    """
    rows = stack
    for hop, group in zip(route.hops, groups, strict=True):
        leaving = rows.index_select(0, torch.tensor(hop.order, dtype=torch.int64, device=stack.device))
        rows = stack.new_empty(sum(hop.arriving), *stack.shape[1:])
        with recorded("all_to_all", group):
            dist.all_to_all_single(rows, leaving, output_split_sizes=hop.arriving, input_split_sizes=hop.sent, group=group)
    stack.index_copy_(0, torch.tensor(route.into, dtype=torch.int64, device=stack.device), rows)
