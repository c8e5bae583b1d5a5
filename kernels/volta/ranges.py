"""A mask as ranges: every mask of `Mask` shows a query one run of keys, and a key to one run of queries.

So a kernel needs two numbers per row, causal or not, with documents, a window and offsets alike, and no mask tensor.
"""

from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import torch
from llmtrain_kernels.volta.arguments import ROWS
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


class Ranges(NamedTuple):
    """`seen` [B or 1, rows, 2] int32: row i sees the columns from the first number up to, not including, the second; none if not less.

    `reach` [B or 1, row tiles, 2] int32: the same for the rows of a tile together.
    """

    seen: Tensor
    reach: Tensor


@lru_cache(maxsize=16)
def keys_seen(pattern: Pattern, device: torch.device) -> Ranges:
    """Rows are queries, columns keys."""
    place = torch.arange(pattern.queries) + pattern.q_offset
    first, end = _documents(pattern, place)
    if pattern.causal:
        end = end.minimum(place + 1)
    if pattern.window:
        first = first.maximum(place - pattern.window + 1)
    return _clipped(first, end, pattern.kv_offset, pattern.keys, device)


@lru_cache(maxsize=16)
def queries_seeing(pattern: Pattern, device: torch.device) -> Ranges:
    """Rows are keys, columns the queries that see them."""
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


def _clipped(first: Tensor, end: Tensor, offset: int, length: int, device: torch.device) -> Ranges:
    seen = torch.stack(torch.broadcast_tensors(first, end), -1).sub_(offset).clamp_(0, length)
    none = torch.tensor([length, 0])
    whole = torch.where((seen[..., :1] < seen[..., 1:]), seen, none)
    missing = none.expand(len(seen), -seen.shape[1] % ROWS, 2)
    tiles = torch.cat([whole, missing], 1).unflatten(1, (-1, ROWS))
    reach = torch.stack([tiles[..., 0].amin(-1), tiles[..., 1].amax(-1)], -1)
    return Ranges(*(x.int().contiguous().to(device) for x in (seen, reach)))
