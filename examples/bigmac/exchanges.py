"""What a rank hands to its process groups, and how long its all-to-alls take: seen where c10d's operators are dispatched."""

import time
from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from llmtrain.layout.traffic import sent

KINDS = {
    "alltoall_base_": "all_to_all",
    "_allgather_base_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "allreduce_": "all_reduce",
}


class Exchanges(TorchDispatchMode):
    """A context around steps.

    Each all-to-all is waited for where it is begun, so that its time is known. That changes nothing in a layer without shared experts,
    which has nothing else to do meanwhile.
    """

    def __init__(self):
        super().__init__()
        self.spans: list[tuple[float, float]] = []
        """Begin and end of each all-to-all, by a clock that all ranks of a machine share."""
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        """That left this rank: `rows` and `counts` of all-to-alls, and for other collectives what a ring sends."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = func.overloadpacket.__name__
        if func.namespace != "c10d" or name == "barrier":
            return func(*args, **(kwargs or {}))
        kind = KINDS[name]  # what is not known here must not go uncounted
        if kind != "all_to_all":
            self._count(kind, args)
            return func(*args, **(kwargs or {}))
        self._count_exchange(*args[1:3], args[4])
        started = time.perf_counter()
        work = func(*args, **(kwargs or {}))
        dist.Work.unbox(work).wait()
        self.spans.append((started, time.perf_counter()))
        return work

    def _count_exchange(self, given: torch.Tensor, group: torch.ScriptObject, splits: list[int]) -> None:
        group = dist.ProcessGroup.unbox(group)
        kept = splits[group.rank()] if splits else len(given) // group.size()
        kind = "rows" if given.is_floating_point() else "counts"
        self._add(kind, (len(given) - kept) * given[:1].nbytes)

    def _count(self, kind: str, args: tuple) -> None:
        group = next(arg for arg in args if isinstance(arg, torch.ScriptObject) and arg._type().qualified_name().endswith("ProcessGroup"))
        ranks = dist.ProcessGroup.unbox(group).size()
        given = args[0] if kind == "all_reduce" else args[1]
        size = sum(tensor.nbytes for tensor in (given if isinstance(given, list) else [given]))
        self._add(kind, sent(kind, size / ranks if kind == "reduce_scatter" else size, ranks))

    def _add(self, kind: str, size: float) -> None:
        self.calls[kind] += 1
        self.bytes[kind] += int(size)

    def summary(self) -> dict:
        """JSON-able."""
        return {"spans": self.spans, "calls": dict(self.calls), "bytes": dict(self.bytes)}
