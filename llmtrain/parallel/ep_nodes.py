"""Hierarchical dispatch: `parallel.ep_kind: hierarchical`. A token crosses to another node once, however many experts it has there.

As MindSpeed's hierarchical alltoall (branch core_r0.8.0) and Pangu Ultra MoE (arXiv 2505.04519). Between nodes a rank receives (nodes - 1)
vectors a token that it holds, and sends as many back, where plain all-to-alls move top_k (nodes - 1) / nodes of them each way.

Shapes: N tokens of this rank, A = nodes * N those of the ranks at its place in all nodes, k experts of each, E experts, M' of the A k
copies that go to experts of this node, W width of what is sent.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from llmtrain.ops.experts import inverse
from llmtrain.parallel.ep_rows import Leaving, Shares, ThroughShares
from llmtrain.parallel.hang.where import device_wait
from llmtrain.parallel.mesh import NodeGroups
from llmtrain.parallel.ops.in_flight import AllGather, ReduceScatter
from llmtrain.parallel.ops.pending import start_gather


class Copies(NamedTuple):
    """Which copies of A tokens are rows of this node."""

    order: Tensor
    """[M']: row i is copy order[i] = token * k + slot."""
    places: Tensor
    """[A,k]: the row of each copy, M' for one that is none."""

    @classmethod
    def of(cls, ids: Tensor, experts: int, rows: int) -> "Copies":
        """For ids [A,k] counted from this node's first expert: copies that go to one of `experts`, of which there are `rows`, sorted by it,
        then by token."""
        elsewhere = (ids < 0) | (ids >= experts)
        order = ids.masked_fill(elsewhere, experts).flatten().argsort(stable=True)
        return cls(order[:rows], inverse(order).clamp(max=rows).view_as(ids))

    @property
    def tokens(self) -> Tensor:
        """[M']: the token of each row."""
        return self.order // self.places.shape[1]


class Sent(NamedTuple):
    """Rows on their way within the node, and how results find back: what `start` leaves for `wait`."""

    shares: Shares
    leaving: Leaving
    copies: Copies
    probs: Tensor
    """[A,k]"""
    tokens: int
    """N"""


@dataclass
class HierarchicalDispatcher(ThroughShares):
    """Experts shared out over the ranks of all nodes in equal runs, as by AllToAllDispatcher, node after node.

    `start` gathers tokens, probabilities and numbers of experts from the ranks at this one's place in the other nodes, which it waits for,
    and sends those copies on that go to experts of this node, by an all-to-all within it that is left under way. `combine_start` sends
    results back within the node, `combine_wait` adds them up by token and sums over nodes. The backward pass mirrors it. Ranks may hold
    different numbers of tokens; the shorter are padded with tokens that go nowhere.
    """

    nodes: NodeGroups
    experts: int

    def start(self, x: Tensor, probs: Tensor, ids: Tensor) -> Sent:
        outer, held = self.nodes.outer, self.experts // self.nodes.outer.size()
        counts = torch.bincount(ids.flatten(), minlength=self.experts + 1)
        everyone = start_gather(counts[None], outer).wait()  # [nodes,E+1]
        with device_wait():
            longest = int(everyone.sum(1).max()) // ids.shape[1]
        tokens = len(x)
        x, probs, ids = _padded(x, longest), _padded(probs, longest), _padded(ids, longest, self.experts)
        gather_probs, gather_x = AllGather(outer, hands_over=False), AllGather(outer)
        numbers, probs = start_gather(ids, outer), gather_probs.start(probs)
        x = gather_x.start(x)
        first = outer.rank() * held
        shares = Shares.of(everyone[:, first : first + held].sum(0), self.nodes.inner)  # while tokens are on their way
        copies = Copies.of(numbers.wait() - first, held, sum(shares.sent))
        x, probs = gather_x.wait(x), gather_probs.wait(probs)
        return Sent(shares, shares.send(_Spread.apply(x, copies)), copies, probs, tokens)

    def combine_wait(self, handle: tuple[Leaving, Sent]) -> Tensor:
        leaving, sent = handle
        results = leaving.flight.wait(leaving.buffer)  # [M',W']
        weighed = results * sent.probs.flatten().index_select(0, sent.copies.order).unsqueeze(-1)
        sums = _Collect.apply(weighed, sent.copies).to(results.dtype)  # [A,W']
        scatter = ReduceScatter(self.nodes.outer)
        return scatter.wait(scatter.start(sums))[: sent.tokens]


def _padded(rows: Tensor, length: int, value: float = 0.0) -> Tensor:
    return rows if len(rows) == length else F.pad(rows, (0, 0, 0, length - len(rows)), value=value)


class _Spread(torch.autograd.Function):
    """Tokens [A,W] -> rows [M',W]."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, copies: Copies) -> Tensor:
        ctx.copies = copies
        return tokens.index_select(0, copies.tokens)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _sums(grad, ctx.copies.places), None


class _Collect(torch.autograd.Function):
    """Rows [M',W] -> their sums by token [A,W]."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, copies: Copies) -> Tensor:
        ctx.copies = copies
        return _sums(rows, copies.places)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.index_select(0, ctx.copies.tokens), None


def _sums(rows: Tensor, places: Tensor) -> Tensor:
    """Per token the sum of rows[places], slot by slot and so in one order on every device, in fp32 or higher."""
    padded = F.pad(rows, (0, 0, 0, 1))
    total = rows.new_zeros(len(places), rows.shape[1], dtype=torch.promote_types(rows.dtype, torch.float32))
    for place in places.unbind(1):
        total += padded.index_select(0, place)
    return total.to(rows.dtype)
