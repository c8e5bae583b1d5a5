"""Memory that a piece of code holds, measured at torch's operators."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Held(TorchDispatchMode):
    """`with Held() as held:` measures results of operators that were not there before.

    `peak`: most bytes of storages alive at a time; `largest`: of one storage. Scratch memory inside an operator is not seen.
    """

    def __init__(self):
        super().__init__()
        self.peak = self.largest = self._now = 0
        self._alive = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {x.untyped_storage() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and x.untyped_storage() not in given:
                self._begin(x.untyped_storage())
        return result

    def _begin(self, storage: torch.UntypedStorage) -> None:
        if storage in self._alive:
            return
        size = storage.nbytes()
        self._alive.add(storage)
        self._now += size
        self.peak, self.largest = max(self.peak, self._now), max(self.largest, size)
        weakref.finalize(storage, self._end, size)

    def _end(self, size: int) -> None:
        self._now -= size
