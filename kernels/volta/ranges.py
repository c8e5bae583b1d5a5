"""A mask as ranges: every mask of `Mask` shows a query one run of keys, and a key to one run of queries.

So a kernel needs two numbers per row, causal or not, with documents, a window and offsets alike, and no mask tensor.
"""

from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor


class Pattern(NamedTuple):
    """A mask and the call that it is for, as hashable numbers. `counts` documents per batch row of `lengths`, none without documents."""

    causal: bool
    window: int
    counts: tuple[int, ...]
    lengths: tuple[int, ...]
    queries: int
    keys: int
    q_offset: int
    kv_offset: int


@lru_cache(maxsize=16)
def keys_seen(pattern: Pattern, device: torch.device) -> Tensor:
    """[B or 1, queries, 2] int32: query i sees the keys from the first number up to, not including, the second. Empty if not less."""
    place = torch.arange(pattern.queries) + pattern.q_offset
    first, end = _documents(pattern, place)
    if pattern.causal:
        end = end.minimum(place + 1)
    if pattern.window:
        first = first.maximum(place - pattern.window + 1)
    return _clipped(first, end, pattern.kv_offset, pattern.keys, device)


@lru_cache(maxsize=16)
def queries_seeing(pattern: Pattern, device: torch.device) -> Tensor:
    """[B or 1, keys, 2] int32: key j is seen by the queries from the first number up to, not including, the second."""
    place = torch.arange(pattern.keys) + pattern.kv_offset
    first, end = _documents(pattern, place)
    if pattern.causal:
        first = first.maximum(place)
    if pattern.window:
        end = end.minimum(place + pattern.window)
    return _clipped(first, end, pattern.q_offset, pattern.queries, device)


def _documents(pattern: Pattern, place: Tensor) -> tuple[Tensor, Tensor]:
    """First position and end of the document of each place, [B or 1, places]."""
    if not pattern.counts:
        everywhere = max(pattern.q_offset + pattern.queries, pattern.kv_offset + pattern.keys)
        return torch.zeros_like(place)[None], torch.full_like(place, everywhere)[None]
    rows, start = [], 0
    for count in pattern.counts:
        edges = torch.tensor([0, *accumulate(pattern.lengths[start : start + count])])
        which = torch.bucketize(place, edges[1:], right=True)
        rows.append((edges[which], edges[which + 1]))
        start += count
    first, end = zip(*rows)
    return torch.stack(first), torch.stack(end)


def _clipped(first: Tensor, end: Tensor, offset: int, length: int, device: torch.device) -> Tensor:
    pair = torch.stack(torch.broadcast_tensors(first, end), -1) - offset
    return pair.clamp_(0, length).int().contiguous().to(device)
