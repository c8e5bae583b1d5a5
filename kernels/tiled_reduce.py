"""Attention, output projection and the sum over ranks, tile by tile: while one tile is summed, the next one is computed.

FastAttention's Tiling-AllReduce (arXiv 2410.16663): heads are shared by ranks, so that what each of them projects is a partial sum. Nothing
here knows of ranks: `reduce` begins a sum, and whoever gives it decides what carries that out.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple, Protocol

import torch
from llmtrain_kernels.mask import Mask
from torch import Tensor


class Handle(Protocol):
    """A sum that is under way."""

    def wait(self) -> object:
        """Return when the tensor holds the sum (on an accelerator: for what its current stream does from now on)."""


Reduce = Callable[[Tensor], Handle]
"""Begins to replace a contiguous tensor by its sum over all ranks."""


class Tile(NamedTuple):
    """Batch rows and positions of one tile; indexes a tensor [B,S,...]."""

    rows: slice
    positions: slice


def tiles(batch: int, length: int, count: int) -> list[Tile]:
    """B batch rows of S positions in about `count` tiles, each of which is one piece of memory of a contiguous [B,S,...].

    Whole rows if there are enough of them, else as many pieces of each row as it takes to have `count`; no tile is empty.
    """
    if batch >= count:
        return [Tile(rows, slice(0, length)) for rows in _cut(batch, count)]
    return [Tile(slice(row, row + 1), positions) for row in range(batch) for positions in _cut(length, -(-count // batch))]


def _cut(length: int, count: int) -> list[slice]:
    count = max(1, min(count, length))
    return [slice(a, b) for a, b in pairwise(length * i // count for i in range(count + 1))]


def project_reduce(
    inputs: Callable[[Tile], Tensor], weight: Tensor, *, tiles: Sequence[Tile], shape: tuple[int, int], reduce: Reduce
) -> Tensor:
    """The sum over ranks of inputs times `weight` [D,F]: [B,S,D], without gradients.

    Args:
        inputs: the F numbers of every position of a tile, called for one tile after the other while `reduce` sums those before it.
        tiles: of [B,S], without gaps; what `tiles` gives.
        shape: B, S.
        reduce: begins a sum. All of them are under way at once, at the end they are waited for in order.
    """
    if torch.is_grad_enabled() and weight.requires_grad:
        raise ValueError("project_reduce has no backward pass; call it under torch.no_grad()")
    out = weight.new_empty(*shape, weight.shape[0])
    started = []
    for tile in tiles:
        part = out[tile]
        torch.mm(inputs(tile).reshape(-1, weight.shape[1]), weight.t(), out=part.view(-1, weight.shape[0]))
        started.append(reduce(part))
    for handle in started:
        handle.wait()
    return out


def attention_project_reduce(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor,
    *,
    attention: Callable[..., Tensor],
    reduce: Reduce,
    count: int,
    mask: Mask,
    scale: float | None = None,
    q_offset: int = 0,
    kv_offset: int = 0,
) -> Tensor:
    """`attention(q, k, v)` times `weight`, summed over ranks, in about `count` tiles of queries: [B,S,D], without gradients.

    q [B,H,S,d], k [B,K,T,d], v [B,K,T,dv] are this rank's heads, weight [D,H*dv] its columns of the output projection, whose bias
    the caller adds once. `attention` is called as `attention(q, k, v, mask=, scale=, q_offset=, kv_offset=)` with the queries of a tile at
    their own offset, and under a causal mask with the keys up to the last of them alone. Of n tiles that compute for C and are sent for M
    seconds in all, about (n - 1) / n of min(C, M) is saved.
    """

    def inputs(tile: Tile) -> Tensor:
        rows, positions = tile
        end = q_offset + positions.stop
        keys = min(k.shape[2], max(1, end - kv_offset)) if mask.causal else k.shape[2]
        own = _mask_of(mask, rows, max(end, kv_offset + keys))
        start = q_offset + positions.start
        found = attention(
            q[rows, :, positions], k[rows, :, :keys], v[rows, :, :keys], mask=own, scale=scale, q_offset=start, kv_offset=kv_offset
        )
        return found.transpose(1, 2)

    shape = q.shape[0], q.shape[2]
    return project_reduce(inputs, weight, tiles=tiles(*shape, count), shape=shape, reduce=reduce)


def _mask_of(mask: Mask, rows: slice, end: int) -> Mask:
    """The mask of some batch rows and of the positions before `end`; the same object every time."""
    if mask.documents is None:
        return mask
    return mask.once(("tile", rows.start, rows.stop, end), lambda whole: replace(whole, documents=whole.documents[rows]).clipped(end))
