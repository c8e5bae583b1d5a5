"""A mask as intervals: the keys that a query sees follow each other, and so do the queries that see a key.

Both ends of an interval grow with the place. So the first and the last row of a block tell which tiles it has to visit (none between them
is wholly hidden) and which of those need no mask, and one kernel serves every mask: what differs is data.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from llmtrain_kernels.mask import Mask
from torch import Tensor


class Layout(NamedTuple):
    """A mask and the places of a call, as numbers that an operator of torch takes: `counts` documents in each batch row, of `lengths`.

    Without documents both lists are empty. `window` is 0 for none.
    """

    counts: tuple[int, ...]
    lengths: tuple[int, ...]
    causal: bool
    window: int
    q_offset: int
    kv_offset: int


class Intervals(NamedTuple):
    """Query i sees keys first[i] to last[i] - 1, key j is seen by queries q_first[j] to q_last[j] - 1.

    int32, [B or 1,S] and [B or 1,T], as numbers in the call; empty ones have equal ends.
    """

    first: Tensor
    last: Tensor
    q_first: Tensor
    q_last: Tensor


def documents(mask: Mask) -> tuple[list[int], list[int]]:
    """Documents in every batch row, and the lengths of all of them."""
    rows = mask.documents or ()
    return [len(row) for row in rows], [length for row in rows for length in row]


@lru_cache(maxsize=32)
def intervals(layout: Layout, queries: int, keys: int, device: torch.device) -> Intervals:
    """Those of a call of `queries` by `keys`, on `device`; made once for the layers of a micro-batch."""
    query = torch.arange(queries)[None] + layout.q_offset
    key = torch.arange(keys)[None] + layout.kv_offset
    first, last = _borders(layout, query)
    q_first, q_last = _borders(layout, key)
    if layout.causal:
        last, q_first = last.clamp(max=query + 1), q_first.clamp(min=key)
    if layout.window:
        first, q_last = first.clamp(min=query - layout.window + 1), q_last.clamp(max=key + layout.window)
    ends = [(x - layout.kv_offset).clamp(0, keys) for x in (first, last)]
    ends += [(x - layout.q_offset).clamp(0, queries) for x in (q_first, q_last)]
    return Intervals(*(x.to(device, torch.int32).contiguous() for x in ends))


def _borders(layout: Layout, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Where the documents of positions [1,n] begin and end, [B or 1,n] each."""
    if not layout.counts:
        return torch.zeros_like(positions), torch.full_like(positions, torch.iinfo(torch.int32).max)
    begins, ends, lengths = [], [], iter(layout.lengths)
    for count in layout.counts:
        row = torch.tensor([next(lengths) for _ in range(count)])
        end = row.cumsum(0)
        document = torch.bucketize(positions[0], end, right=True)
        begins.append((end - row)[document])
        ends.append(end[document])
    return torch.stack(begins), torch.stack(ends)
