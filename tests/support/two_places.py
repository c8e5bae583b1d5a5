"""A device and a host on one CPU: what lies where is followed, copies are made late, and no operator may mix the two."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llmtrain.compat import memory_of
from llmtrain.device.host_copies import Copy, HostCopies

DEVICE, HOST = "device", "host"


class TwoPlaces(TorchDispatchMode):
    """A context; `before` lies on the device. A result lies where its inputs do, and anywhere if these do not say."""

    def __init__(self, *before: Tensor):
        super().__init__()
        self.where: dict[Any, str] = {memory_of(tensor): DEVICE for tensor in before}
        self.off = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if self.off:
            return out
        given = {self.where.get(memory_of(tensor)) for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)} - {None}
        assert len(given) < 2, f"{func} mixes tensors of the device and of the host"
        if given and func is torch.ops.aten.new_zeros.default and (kwargs or {}).get("device") is not None:
            given = {HOST}
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and given:
                self.put(tensor, *given)
        return out

    def put(self, tensor: Tensor, place: str) -> Tensor:
        """The tensor, which lies there from now on."""
        self.where[memory_of(tensor)] = place
        return tensor


class LateCopies(HostCopies):
    """Copies between the two that are made when they are waited for, by whom they are meant for; until then there is NaN."""

    def __init__(self, places: TwoPlaces):
        self.places = places
        self.made: list[tuple[str, int]] = []
        """Where to, and how many bytes."""

    def host_memory(self, like: Tensor) -> Tensor:
        return self._memory(like, HOST)

    def device_memory(self, like: Tensor) -> Tensor:
        return self._memory(like, DEVICE)

    def to_host(self, tensor: Tensor, *, into: Tensor | None = None) -> Copy:
        assert self.places.where[memory_of(tensor)] == DEVICE
        return Late(self, self.host_memory(tensor) if into is None else into, tensor, HOST)

    def to_device(self, tensor: Tensor) -> Copy:
        assert self.places.where[memory_of(tensor)] == HOST
        return Late(self, self.device_memory(tensor), tensor, DEVICE)

    def _memory(self, like: Tensor, place: str) -> Tensor:
        self.places.off = True
        memory = torch.full_like(like, float("nan"))
        self.places.off = False
        return self.places.put(memory, place)


class Late(Copy):
    """One of these."""

    def __init__(self, copies: LateCopies, tensor: Tensor, source: Tensor, place: str):
        super().__init__(tensor, source)
        self._copies, self._place = copies, place

    def wait(self) -> Tensor:
        return self._make(DEVICE)

    def finish(self) -> Tensor:
        return self._make(HOST)

    def _make(self, reader: str) -> Tensor:
        if reader == self._place and self._source is not None:
            self._copies.places.off = True
            self._tensor.copy_(self._source)
            self._copies.places.off = False
            self._copies.made.append((self._place, self._source.nbytes))
            self._source = None
        return self._tensor
