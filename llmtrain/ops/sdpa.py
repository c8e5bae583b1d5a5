"""Attention through torch's scaled_dot_product_attention, without an S x T mask.

A mask is lowered to plain calls on slices: each document is a call of its own, causal and full pieces use the kernel's own modes, and
only pieces that are neither (a window, or several queries after a cache) get a mask, of one block of queries by the keys it can see.
"""

from collections.abc import Iterator
from itertools import accumulate, groupby, pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from llmtrain_kernels.contract import check_attention
from llmtrain_kernels.mask import Mask
from torch import Tensor

from llmtrain.ops.attention_shapes import narrow, one_width
from llmtrain.ops.registry import Call, register

BLOCK = 256
"""Queries per explicit mask, and the smallest block of a windowed call."""


def sdpa_supports(call: Call) -> str | None:
    """Why scaled_dot_product_attention should not serve `call`, or None."""
    if call.return_lse:
        return "returns no log-sum-exp"
    if call.dtype == torch.float64 and call.device != "cpu":
        return f"would hold all S x T scores in float64 on {call.device}"
    if call.dtype == torch.bfloat16 and call.capability is not None and call.device == "cuda" and call.capability < (8, 0):
        return f"has no bfloat16 kernel for compute capability {call.capability[0]}.{call.capability[1]}"
    return None


@register("attention", "sdpa", speed=1, supports=sdpa_supports)
def attention_sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask,
    scale: float | None = None,
    q_offset: int = 0,
    kv_offset: int = 0,
    return_lse: bool = False,
) -> Tensor:
    """Attention by torch.nn.functional.scaled_dot_product_attention; shapes as in `attention_reference`.

    Never builds an S x T tensor: documents become separate calls (batch rows of one layout together). Raises ValueError for `return_lse`.
    """
    if return_lse:
        raise ValueError("kernels.attention=sdpa returns no log-sum-exp; use kernels.attention: reference")
    check_attention(q, k, v, mask, q_offset=q_offset, kv_offset=kv_offset)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    value_dim = v.shape[-1]
    q, k, v = one_width(q, k, v)  # the fused kernels want one head dim, and without them all scores are held
    call = _Lowering(mask, scale=scale, q_offset=q_offset, kv_offset=kv_offset)
    if mask.documents is None:
        out = call.row(q, k, v, None)
    else:
        out = call.documents(q, k, v)
    return narrow(out, value_dim)


class _Lowering:
    """One call's mask, lowered to SDPA calls. Positions are absolute: query i at q_offset + i, key j at kv_offset + j."""

    def __init__(self, mask: Mask, *, scale: float, q_offset: int, kv_offset: int):
        self.mask, self.causal, self.window = mask, mask.causal, mask.window
        self.scale, self.q_offset, self.kv_offset = scale, q_offset, kv_offset

    def documents(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Batch rows with one document layout share calls; rows come back in their order."""
        layouts, back = self.mask.once("layouts", _layouts)
        if len(layouts) == 1:
            return self.row(q, k, v, layouts[0].spans)
        out = torch.cat([self.row(*(_rows(x, rows) for x in (q, k, v)), spans) for rows, spans in layouts])
        return out if back is None else out[back]

    def row(self, q: Tensor, k: Tensor, v: Tensor, spans: list[tuple[int, int]] | None) -> Tensor:
        """Batch rows of one layout, whose documents lie at `spans`: the pieces of the query axis, in order, joined."""
        first, last = self.q_offset, self.q_offset + q.shape[2]
        outs = []
        for start, end in spans or [(0, max(last, self.kv_offset + k.shape[2]))]:
            lo, hi = max(start, first), min(end, last)
            if lo < hi:
                outs += self.span(q, k, v, (lo, hi), (max(start, self.kv_offset), min(end, self.kv_offset + k.shape[2])))
        return outs[0] if len(outs) == 1 else torch.cat(outs, dim=2)

    def span(self, q: Tensor, k: Tensor, v: Tensor, queries: tuple[int, int], keys: tuple[int, int]) -> Iterator[Tensor]:
        """Queries and keys of one document, split at the places where the kind of piece changes."""
        lo, hi = queries
        first, last = keys
        if first >= last:
            yield self._empty(q, v, hi - lo)
        elif not self.causal:
            yield self._call(q, k, v, queries, keys)
        elif lo < first:  # these queries come before every key
            middle = min(first, hi)
            yield self._empty(q, v, middle - lo)
            if middle < hi:
                yield from self.span(q, k, v, (middle, hi), keys)
        elif self.window is not None:
            yield from self._windowed(q, k, v, queries, keys)
        elif last <= lo + 1:  # even the first query sees every key: decoding one token is this case
            yield self._call(q, k, v, queries, keys)
        elif hi > last:  # queries after the last key see all of them
            yield from self.span(q, k, v, (lo, last), keys)
            yield self._call(q, k, v, (last, hi), keys)
        elif lo == first:
            yield self._call(q, k, v, queries, (first, hi), causal=True)
        else:
            yield from self._blocks(q, k, v, queries, keys, BLOCK)

    def _windowed(self, q: Tensor, k: Tensor, v: Tensor, queries: tuple[int, int], keys: tuple[int, int]) -> Iterator[Tensor]:
        assert self.window is not None
        lo, hi = queries
        end = min(hi, keys[1] + self.window - 1)  # later queries have every key behind their window
        if hi - keys[0] <= self.window:  # too short for the window to hide anything
            plain = _Lowering(Mask(causal=True), scale=self.scale, q_offset=self.q_offset, kv_offset=self.kv_offset)
            yield from plain.span(q, k, v, queries, keys)
            return
        if lo < end:
            yield from self._blocks(q, k, v, (lo, end), keys, max(BLOCK, self.window // 2))
        if max(lo, end) < hi:
            yield self._empty(q, v, hi - max(lo, end))

    def _blocks(self, q: Tensor, k: Tensor, v: Tensor, queries: tuple[int, int], keys: tuple[int, int], block: int) -> Iterator[Tensor]:
        """Blocks of queries, each with the keys it can see and a mask of just that size; every query sees a key."""
        for lo in range(queries[0], queries[1], block):
            hi = min(lo + block, queries[1])
            first = keys[0] if self.window is None else max(keys[0], lo - self.window + 1)
            last = min(keys[1], hi)
            yield self._call(q, k, v, (lo, hi), (first, last), seen=self._seen(range(lo, hi), range(first, last), q.device))

    def _seen(self, queries: range, keys: range, device: torch.device) -> Tensor:
        query = torch.arange(queries.start, queries.stop, device=device)[:, None]
        key = torch.arange(keys.start, keys.stop, device=device)
        seen = key <= query
        return seen if self.window is None else seen & (key > query - self.window)

    def _call(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        queries: tuple[int, int],
        keys: tuple[int, int],
        *,
        causal: bool = False,
        seen: Tensor | None = None,
    ) -> Tensor:
        q = q[:, :, queries[0] - self.q_offset : queries[1] - self.q_offset]
        k, v = (x[:, :, keys[0] - self.kv_offset : keys[1] - self.kv_offset] for x in (k, v))
        grouped = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, is_causal=causal, scale=self.scale, enable_gqa=grouped)

    @staticmethod
    def _empty(q: Tensor, v: Tensor, length: int) -> Tensor:
        return q.new_zeros(q.shape[0], q.shape[1], length, v.shape[-1])


class _Layout(NamedTuple):
    """Batch rows with the same documents, and where those begin and end."""

    rows: list[int]
    spans: list[tuple[int, int]]


def _layouts(mask: Mask) -> tuple[list[_Layout], list[int] | None]:
    """The layouts of all rows, and where each row is found when they are joined; None if that is in order."""
    assert mask.documents is not None
    found: dict[tuple[int, ...], list[int]] = {}
    for row, lengths in enumerate(mask.documents):
        found.setdefault(lengths, []).append(row)
    order = [row for rows in found.values() for row in rows]
    back = sorted(range(len(order)), key=order.__getitem__)
    layouts = [_Layout(rows, list(pairwise(accumulate(lengths, initial=0)))) for lengths, rows in found.items()]
    return layouts, None if back == sorted(back) else back


def _rows(x: Tensor, rows: list[int]) -> Tensor:
    """Batch rows of x, as a view where they follow each other."""
    consecutive = len(list(groupby(enumerate(rows), key=lambda pair: pair[1] - pair[0]))) == 1
    return x[rows[0] : rows[-1] + 1] if consecutive else x[rows]
