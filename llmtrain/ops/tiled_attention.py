"""Causal attention on the CPU as matrix products over blocks of queries, forward and backward.

PyTorch's CPU flash kernel tiles finely, which suits long sequences. Up to some thousand tokens, products of a block of queries with all the
keys that it can see run at a higher rate. Scores of one block by its keys exist at a time, never S x T.
"""

from collections.abc import Iterator
from itertools import islice
from typing import Any, NamedTuple

import torch
from llmtrain_kernels.contract import check_attention
from llmtrain_kernels.mask import Mask
from torch import Tensor

from llmtrain.ops.registry import Call, register
from llmtrain.ops.sdpa import attention_sdpa

BLOCK = 128
"""Queries per product: fastest or within 6% of it at 512 and 2,048 tokens, in fp32 and bf16."""

LONGEST = {2: 2048, 4: 512, 8: 512}
"""Tokens of a document up to which this is used, by bytes of a number: beyond, the flash kernel is as fast or faster."""


def _supports(call: Call) -> str | None:
    if call.return_lse:
        return "returns no log-sum-exp"
    if not call.causal:
        return "serves causal attention only"
    return None


@register("attention", "tiled", devices=("cpu",), dtypes=(torch.float64, torch.float32, torch.bfloat16), speed=2, supports=_supports)
def attention_tiled(
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
    """Shapes as in `attention_reference`. Softmax in fp32 (fp64 for fp64).

    Calls with a cache or offsets, without causality, or with a document above LONGEST tokens, are handed to `attention_sdpa`.
    Raises ValueError for `return_lse`.
    """
    if return_lse:
        raise ValueError("kernels.attention=tiled returns no log-sum-exp; use kernels.attention: reference")
    check_attention(q, k, v, mask, q_offset=q_offset, kv_offset=kv_offset)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    counts, lengths, longest = mask.once("lists", _lists) if mask.documents is not None else _whole(q.shape[0], q.shape[2])
    if not mask.causal or q_offset or kv_offset or q.shape[2] != k.shape[2] or longest > LONGEST[q.element_size()]:
        return attention_sdpa(q, k, v, mask=mask, scale=scale, q_offset=q_offset, kv_offset=kv_offset)
    return tiled_op(q, k, v, counts, lengths, mask.window or 0, scale)


def _lists(mask: Mask) -> tuple[list[int], list[int], int]:
    """Documents in every row, the lengths of all of them, and the longest."""
    lengths = [length for row in mask.documents for length in row]
    return [len(row) for row in mask.documents], lengths, max(lengths, default=0)


def _whole(rows: int, length: int) -> tuple[list[int], list[int], int]:
    """The same for rows of one document each."""
    return [1] * rows, [length] * rows, length


class _Tile(NamedTuple):
    """Queries first..last of a document, the keys start..last that they can see, and what to add to the last scores of each."""

    first: int
    last: int
    start: int
    bias: Tensor


class _Tiling:
    """How one call is cut: documents, and in each of them blocks of queries."""

    def __init__(self, counts: list[int], lengths: list[int], window: int, dtype: torch.dtype):
        self.counts, self.lengths, self.window, self.dtype = counts, lengths, window, dtype
        self.triangle = torch.full((BLOCK, BLOCK), float("-inf"), dtype=dtype).triu_(1)

    def documents(self) -> Iterator[tuple[int, slice]]:
        """Batch row and place of every document."""
        lengths = iter(self.lengths)
        for row, count in enumerate(self.counts):
            begin = 0
            for length in islice(lengths, count):
                yield row, slice(begin, begin + length)
                begin += length

    def tiles(self, length: int) -> Iterator[_Tile]:
        """The tiles of a document; the bias covers the keys of the block itself, with a window all of them."""
        for first in range(0, length, BLOCK):
            last = min(first + BLOCK, length)
            if not self.window or last <= self.window:
                yield _Tile(first, last, 0, self.triangle[: last - first, : last - first])
            else:
                start = max(0, first - self.window + 1)
                yield _Tile(first, last, start, self._windowed(range(first, last), range(start, last)))

    def _windowed(self, queries: range, keys: range) -> Tensor:
        distance = torch.arange(queries.start, queries.stop)[:, None] - torch.arange(keys.start, keys.stop)
        hidden = (distance < 0) | (distance >= self.window)
        return torch.zeros(hidden.shape, dtype=self.dtype).masked_fill_(hidden, float("-inf"))


def _fold(x: Tensor, tile: _Tile, kv_heads: int) -> Tensor:
    """The tile's queries of x [H,S,d] as [K, G x n, d]: the G query heads of one key head stand below each other."""
    block = x[:, tile.first : tile.last]
    return block.reshape(kv_heads, -1, block.shape[2])


def _probabilities(q: Tensor, k: Tensor, tile: _Tile, high: torch.dtype) -> Tensor:
    """Scaled queries [K, G x n, d], keys of the document [K,m,d] -> softmax of the biased scores [K, G x n, keys] in `high`."""
    scores = torch.bmm(q, k[:, tile.start : tile.last].transpose(1, 2))
    rows, columns = tile.bias.shape
    scores.view(len(k), -1, rows, scores.shape[2])[..., -columns:].add_(tile.bias)
    wide = scores.to(high)
    return torch.softmax(wide, -1, out=wide)


# An operator of torch, so that selective recomputation sees one call whose output it keeps, not the scores inside.
@torch.library.custom_op("llmtrain::tiled_attention", mutates_args=())
def tiled_op(q: Tensor, k: Tensor, v: Tensor, counts: list[int], lengths: list[int], window: int, scale: float) -> Tensor:
    """Documents per batch row, the lengths of all of them, a window (0 for none) -> [B,H,S,dv]."""
    tiling, high = _Tiling(counts, lengths, window, q.dtype), torch.promote_types(q.dtype, torch.float32)
    out = q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3]).transpose(1, 2)  # [B,S,H,dv] in memory, as out_proj reads it
    scaled = q * scale
    for row, document in tiling.documents():
        query, key, value, result = (x[row, :, document] for x in (scaled, k, v, out))
        for tile in tiling.tiles(document.stop - document.start):
            probabilities = _probabilities(_fold(query, tile, len(key)), key, tile, high).to(q.dtype)
            product = torch.bmm(probabilities, value[:, tile.start : tile.last])
            result[:, tile.first : tile.last] = product.view(len(query), -1, product.shape[2])
    return out


def _keep(ctx: Any, inputs: tuple, output: Tensor) -> None:
    q, k, v, *rest = inputs
    ctx.save_for_backward(q, k, v, output)
    ctx.rest = rest


def _backward(ctx: Any, grad: Tensor) -> tuple:
    if torch.is_grad_enabled():
        raise RuntimeError("kernels.attention=tiled has no second derivative; use kernels.attention: reference")
    q, k, v, out = ctx.saved_tensors
    counts, lengths, window, scale = ctx.rest
    tiling, high = _Tiling(counts, lengths, window, q.dtype), torch.promote_types(q.dtype, torch.float32)
    grads = grad_q, grad_k, grad_v = tuple(torch.empty_like(x) for x in (q, k, v))
    delta = (grad.to(high) * out).sum(-1, keepdim=True)  # [B,H,S,1]
    scaled = q * scale
    for row, document in tiling.documents():
        parts = (x[row, :, document] for x in (scaled, k, v, grad, delta))
        for whole, part in zip(grads, _document_gradients(*parts, tiling, high)):
            whole[row, :, document] = part
    return grad_q.mul_(scale), grad_k, grad_v, None, None, None, None


tiled_op.register_autograd(_backward, setup_context=_keep)


def _document_gradients(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, delta: Tensor, tiling: _Tiling, high: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of scaled queries [H,m,d], keys [K,m,d] and values [K,m,dv] of one document."""
    grad_q = q.new_empty(q.shape)
    grad_k, grad_v = (torch.zeros(x.shape, dtype=high) for x in (k, v))
    for tile in tiling.tiles(q.shape[1]):
        query, above, shift = (_fold(x, tile, len(k)) for x in (q, grad, delta))
        probabilities = _probabilities(query, k, tile, high)
        slope = torch.bmm(above, v[:, tile.start : tile.last].transpose(1, 2)).to(high)
        slope = slope.sub_(shift).mul_(probabilities).to(q.dtype)
        # A batched product into a slice would go head by head.
        grad_v[:, tile.start : tile.last] += torch.bmm(probabilities.to(q.dtype).transpose(1, 2), above)
        grad_k[:, tile.start : tile.last] += torch.bmm(slope.transpose(1, 2), query)
        grad_q[:, tile.first : tile.last] = torch.bmm(slope, k[:, tile.start : tile.last]).view(len(q), -1, q.shape[2])
    return grad_q, grad_k, grad_v
