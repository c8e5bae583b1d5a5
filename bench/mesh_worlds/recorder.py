"""Which collectives a rank calls, in what order, with how many bytes, whoever calls them: seen where c10d's operators are dispatched."""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

NAMES = {
    "allreduce_": "all_reduce",
    "_allgather_base_": "all_gather",
    "allgather_": "all_gather (list)",
    "_reduce_scatter_base_": "reduce_scatter",
    "send": "send",
    "recv_": "recv",
    "broadcast_": "broadcast",
    "alltoall_base_": "all_to_all",
}
PRODUCTS = {getattr(torch.ops.aten, name) for name in ("mm", "addmm", "bmm", "addmm_")}


class Collective(NamedTuple):
    """One call. `bytes` of the larger side: what an all-gather gives, what a reduce-scatter takes."""

    op: str
    ranks: tuple[int, ...]
    bytes: int
    moment: int
    """Matrix products that this rank has done before it."""

    def __str__(self) -> str:
        return f"{self.op} of {self.bytes:,} bytes over ranks {','.join(map(str, self.ranks))}"


class Recorder(TorchDispatchMode):
    """Context in which the collectives of this thread are noted in `calls`."""

    def __init__(self):
        super().__init__()
        self.calls: list[Collective] = []
        self.products = 0

    def __torch_dispatch__(self, func: Any, types: Sequence[type], args: tuple = (), kwargs: dict | None = None) -> Any:
        if DTensor in types:
            return NotImplemented  # it calls again, on local tensors and with its collectives
        if func.namespace in ("c10d", "_c10d_functional"):
            self._note(func, args)
        elif func.overloadpacket in PRODUCTS:
            self.products += 1
        return func(*args, **(kwargs or {}))

    def _note(self, func: Any, args: tuple) -> None:
        name = func.overloadpacket.__name__
        groups = [dist.ProcessGroup.unbox(arg) for arg in args if isinstance(arg, torch.ScriptObject) and _is_group(arg)]
        if len(groups) != 1:
            raise RuntimeError(f"{func}: its process group was not found; the recorder has to learn this operator")
        sizes = [sum(tensor.nbytes for tensor in _tensors(arg)) for arg in args]
        ranks = tuple(dist.get_process_group_ranks(groups[0]))
        self.calls.append(Collective(NAMES.get(name, name), ranks, max(sizes), self.products))


def _is_group(value: torch.ScriptObject) -> bool:
    return value._type().qualified_name().endswith("ProcessGroup")


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)


def comparable(calls: Sequence[Collective]) -> list[str]:
    """The calls in order, in words. Sends and receives with no product between them are under way together and have no order."""
    found = []
    for (_, p2p), run in groupby(calls, key=lambda call: (call.moment, call.op in ("send", "recv"))):
        words = [str(call) for call in run]
        found += sorted(words, reverse=True) if p2p else words
    return found
