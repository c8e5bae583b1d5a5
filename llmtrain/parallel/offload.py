"""Activations that wait in the host's memory between forward and backward pass, applied to a model's blocks from outside.

A block's tensors leave while the block after it computes, and come back while the backward pass of that one does: at any time the device
holds those of two blocks.
"""

import weakref
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from llmtrain.device.host_copies import Copy, HostCopies
from llmtrain.model.experts import Dispatcher
from llmtrain.model.moe import MoE
from llmtrain.parallel.blocks import all_blocks
from llmtrain.parallel.recompute import dispatcher_of
from llmtrain.parallel.saved import Away, Saving, Ticket, unpack


def apply_offload(model: nn.Module, names: Sequence[str], copies: HostCopies) -> None:
    """Keep the activations `names` (those of `train.offload`: TENSORS) of every block on the host until its backward pass.

    Apply it after recomputation. Raises UserError for a layer whose activations are not to be had.
    """
    if not names:
        return
    blocks = list(all_blocks(model))
    swap = Swap(Saving.of(model), copies, first=blocks[0] if blocks else None)
    for name in names:
        TENSORS[name](blocks, swap)


class Swap:
    """The tensors of one model that are away, block by block."""

    def __init__(self, saving: Saving, copies: HostCopies, *, first: nn.Module | None):
        self.saving, self.copies, self._first = saving, copies, first
        self._parcel: Parcel | None = None
        self._leaving: deque[Parcel] = deque()
        saving.entering.append(self._enter)

    def _enter(self, block: nn.Module, x: Tensor) -> None:
        """A forward pass of `block` begins; that of the model's first one is the beginning of another pass over all."""
        self._parcel = Parcel(self.copies, before=None if block is self._first else self._parcel)
        self._leaving.append(self._parcel)
        while len(self._leaving) > 2:
            self._leaving.popleft().let_go()

    def mark(self, tensor: Tensor) -> None:
        """If `tensor` is saved in this block, it waits on the host."""
        self.saving.mark(tensor, Swapped(self._parcel))


class Parcel:
    """What one forward pass of a block has put away. It knows its tensors as long as anybody needs them."""

    def __init__(self, copies: HostCopies, *, before: "Parcel | None"):
        self.copies, self.before = copies, before
        self._held: list[weakref.ref[Swapped]] = []
        self._fetched = False

    def add(self, swapped: "Swapped") -> None:
        self._held.append(weakref.ref(swapped))

    def let_go(self) -> None:
        """Free the device's memory: the copies have had the time of a block."""
        for swapped in self._alive():
            swapped.let_go()

    def fetch(self) -> None:
        """Begin to copy back, once."""
        if not self._fetched:
            self._fetched = True
            for swapped in self._alive():
                swapped.fetch()

    def reach(self) -> None:
        """The backward pass of the block needs its tensors now, and those of the block before it soon."""
        self.fetch()
        if self.before is not None:
            self.before.fetch()
            self.before = None

    def _alive(self) -> "list[Swapped]":
        return [swapped for held in self._held if (swapped := held()) is not None]


class Swapped(Away):
    """A tensor that waits on the host."""

    def __init__(self, parcel: Parcel):
        super().__init__()
        self._parcel = parcel
        self._source: Tensor | None = None
        self._leaving: Copy | None = None
        self._host: Tensor | None = None
        self._coming: Copy | None = None

    def save(self, tensor: Tensor) -> None:
        super().save(tensor)
        if self._leaving is None:
            # All of its memory, of which operations may save any view.
            self._source = torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(tensor.untyped_storage())
            self._leaving = self._parcel.copies.to_host(self._source)
            self._parcel.add(self)

    def let_go(self) -> None:
        """The host has it: forget the device's memory."""
        self._host, self._source = self._leaving.wait(), None

    def fetch(self) -> None:
        """Begin to copy it back, if it has left."""
        if self._source is None and self._coming is None:
            self._coming = self._parcel.copies.to_device(self._host)

    def restore(self) -> None:
        self._parcel.reach()
        if self._source is not None:  # a block at the end of the forward pass: it is still there
            self.put(self._source)
            return
        self.fetch()
        self.put(self._coming.wait())
        self._coming = None


def _block_input(blocks: list[nn.Module], swap: Swap) -> None:
    swap.saving.entering.append(lambda block, x: swap.mark(x))


def _norm_output(norm: str, blocks: list[nn.Module], swap: Swap) -> None:
    for block in blocks:
        module = getattr(block, norm)
        module.forward = partial(_marked, swap, module.forward)


def _marked(swap: Swap, forward: Callable[..., Any], x: Tensor, residual: Tensor | None = None) -> Any:
    found = forward(x, residual)
    if swap.saving.on:
        swap.mark(found if residual is None else found[0])
    return found


def _expert_output(blocks: list[nn.Module], swap: Swap) -> None:
    for block in blocks:
        for layer in block.modules():
            if isinstance(layer, MoE):
                _without_results(dispatcher_of(layer, "train.offload expert_output"), swap)


def _without_results(dispatcher: Dispatcher, swap: Swap) -> None:
    """Let what `dispatcher` saves of the experts' results, for the gradients of their weights in the sum, wait on the host."""
    start, wait = dispatcher.combine_start, dispatcher.combine_wait

    def start_and_measure(rows: Tensor, combine: Any) -> tuple:
        return start(rows, combine), rows.shape[-1]

    def wait_and_swap(handle: tuple) -> Tensor:
        going, width = handle

        def pack(tensor: Tensor) -> Tensor | Ticket:
            if tensor.is_floating_point() and tensor.shape[-1:] == (width,) and not swap.saving.marked(tensor):
                swap.mark(tensor)
            return swap.saving.pack(tensor)

        if not swap.saving.on:
            return wait(going)
        with saved_tensors_hooks(pack, unpack):
            return wait(going)

    dispatcher.combine_start, dispatcher.combine_wait = start_and_measure, wait_and_swap


TENSORS: dict[str, Callable[[list[nn.Module], Swap], None]] = {
    "block_input": _block_input,
    "attention_input": partial(_norm_output, "attention_norm"),
    "ffn_input": partial(_norm_output, "ffn_norm"),
    "expert_output": _expert_output,
}
"""What puts each tensor away that `train.offload` may name."""
