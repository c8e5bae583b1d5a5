"""Blocks whose keys and values lie in the host's memory, where attention over them is computed too.

For sequences whose cache is larger than a device (FastAttention's CPU-GPU cooperation, arXiv 2410.16663): a new token's queries, keys and
values go to the host and attention's result comes back, a few numbers each, where bringing the cache to the device would move all of it.
A prompt is attended to on the device, and its keys and values leave meanwhile.
"""

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llmtrain.device.host_copies import HostCopies

if TYPE_CHECKING:
    from llmtrain.model.cache import SlotFill, SlotStep

HOST = torch.device("cpu")


class HostBlocks:
    """What a SlotCache asks about the blocks of these names.

    Args:
        names: of the blocks.
        copies: `host_copies()` of the device that computes all else.
        ops: `attention` and `decode_attention` of the host.
    """

    def __init__(self, names: Collection[str], *, copies: HostCopies, ops):
        self.names, self.copies, self.ops = frozenset(names), copies, ops

    def __contains__(self, block: str) -> bool:
        return block in self.names

    def fill(self, view: "SlotFill", block: str) -> "HostFill":
        """The block's part of a pass of several tokens."""
        return HostFill(self, view, block)

    def step(self, view: "SlotStep", block: str) -> "HostStep":
        """The block's part of a pass of one token."""
        return HostStep(self, view, block)

    def compute(self, attend: Callable[[Tensor, Tensor, Tensor], Tensor], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """`attend(q, k, v)` on the host, for tensors [B,H or K,S,d] of the device: there in one copy, and back in another."""
        given = (q, k, v)
        flat = torch.cat([x.transpose(1, 2).flatten(2) for x in given], -1)  # [B,S,H*d+K*d+K*dv]
        parts = self.copies.to_host(flat).finish().split([x.shape[1] * x.shape[3] for x in given], -1)
        out = attend(*(part.unflatten(2, (x.shape[1], x.shape[3])).transpose(1, 2) for part, x in zip(parts, given)))
        return self.copies.to_device(self.copies.host_memory(out).copy_(out)).wait()


class HostFill:
    """One block of a SlotFill."""

    def __init__(self, host: HostBlocks, view: "SlotFill", block: str):
        self.host, self.view, self.block = host, view, block

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, mask, ops) -> Tensor:
        """As FillLayer.attend: new slots on the device, those that hold tokens already on the host, where these are."""
        start = self.view.length
        if start:
            return self.host.compute(lambda q, k, v: self._attend_there(q, k, v, mask=mask), q, k, v)
        leaving = [self.host.copies.to_host(new) for new in (k, v)]
        out = ops.attention(q, k, v, mask=mask, q_offset=0)
        # Waited for here, while a device still attends, so that it need not keep them through the rest of the block.
        for copy, place in zip(leaving, self.view.places(self.block, k, v, device=HOST)):
            place.copy_(copy.finish())
        return out

    def _attend_there(self, q: Tensor, k: Tensor, v: Tensor, *, mask) -> Tensor:
        for new, place in zip((k, v), self.view.places(self.block, k, v)):
            place.copy_(new)
        keys, values = self.view.seen(self.block, k, v)
        return self.host.ops.attention(q, keys, values, mask=mask, q_offset=self.view.length)


class HostStep:
    """One block of a SlotStep."""

    def __init__(self, host: HostBlocks, view: "SlotStep", block: str):
        self.host, self.view, self.block = host, view, block

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, mask, ops) -> Tensor:
        """As StepLayer.attend, on the host."""
        return self.host.compute(lambda q, k, v: self.view.attend(self.block, q, k, v, mask=mask, ops=self.host.ops), q, k, v)
