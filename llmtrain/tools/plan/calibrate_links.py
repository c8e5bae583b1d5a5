"""How long gloo's collectives take between ranks that share a machine: each kind over all and, of an even number, over pairs, all at once.

As in a run: each comes after a product, so that ranks arrive apart and threads have to wake, and from and to memory that no cache holds.
"""

import time
from collections.abc import Callable
from itertools import cycle
from statistics import median
from typing import Any

from llmtrain.compat import all_gather_rows, reduce_scatter_rows
from llmtrain.layout.traffic import sent

SMALL, LARGE = 2**14, 2**21
"""Numbers of the whole tensors by which a collective's start and its rate are told apart: 64 KiB and 8 MiB."""
TENSORS = 8
"""Of each size, in turn."""
CALLS = {SMALL: 40, LARGE: 12}
"""How often each is made, after a quarter of them that warm up."""
PRODUCT = (256, 768)
"""Rows and columns of what is computed between two."""

Found = list[tuple[str, int, float, float]]
"""Kind, ranks, bytes/s of what a rank sends, seconds beside that."""


def collectives(rank: int, ranks: int) -> Found:
    """Measured by every rank at once; the world is initialised."""
    import torch.distributed as dist

    found: Found = []
    for size in sorted({2, ranks}) if ranks % 2 == 0 else (ranks,):  # no rank is left without a pair
        groups = [dist.new_group(list(range(first, first + size))) for first in range(0, ranks, size)]
        group = groups[rank // size]
        for kind in ("all_gather", "reduce_scatter", "all_reduce", "all_to_all", "send"):
            spent = {count: _spent(kind, group, size, rank, count) for count in CALLS}
            small, large = (sent(kind, _unit(kind, 4 * count, size), size) for count in CALLS)
            rate = (large - small) / max(spent[LARGE] - spent[SMALL], 1e-9)
            found.append((kind, size, rate, max(spent[SMALL] - small / rate, 1e-6)))
    return found


def _unit(kind: str, size: float, ranks: int) -> float:
    """`sent` asks for a shard's bytes of an all-gather or a reduce-scatter."""
    return size / ranks if kind in ("all_gather", "reduce_scatter") else size


def _spent(kind: str, group: Any, size: int, rank: int, count: int) -> float:
    """Seconds of one call on `count` fp32 numbers, waiting for the others included."""
    import torch
    import torch.distributed as dist

    calls = CALLS[count]
    dist.barrier()
    call = _call(kind, group, size, rank, count)
    rows, width = PRODUCT
    a, b = torch.randn(rows, width), torch.randn(width, width)
    times = []
    for _ in range(calls + calls // 4):
        a @ b
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return median(times[calls // 4 :])


def _call(kind: str, group: Any, size: int, rank: int, count: int) -> Callable[[], Any]:
    import torch
    import torch.distributed as dist

    part = count // size
    wholes, others = (cycle([torch.zeros(part * size) for _ in range(TENSORS)]) for _ in range(2))
    parts = cycle([torch.zeros(part) for _ in range(TENSORS)])
    first = rank // size * size
    after, before = first + (rank + 1 - first) % size, first + (rank - 1 - first) % size

    def exchange() -> None:
        waiting = dist.isend(next(wholes), after, group=group)
        dist.recv(next(others), before, group=group)
        waiting.wait()

    return {
        "all_gather": lambda: all_gather_rows(next(wholes), next(parts), group=group),
        "reduce_scatter": lambda: reduce_scatter_rows(next(parts), next(wholes), group=group),
        "all_reduce": lambda: dist.all_reduce(next(wholes), group=group),
        "all_to_all": lambda: dist.all_to_all_single(next(others), next(wholes), group=group),
        "send": exchange,
    }[kind]
