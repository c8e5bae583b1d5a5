"""Counts and sizes: what the tiling mask takes, what the two levels of tiles save, what the reference holds."""

from dataclasses import dataclass

import torch
from held_memory import Held
from llmtrain_kernels import Mask, Schedule, Tiling
from llmtrain_kernels.tiling import HIDDEN, VISIBLE
from llmtrain_kernels.tiling_attention import attention
from llmtrain_kernels.tiling_counts import Counts
from llmtrain_kernels.tiling_mask import TilingMask, mask_bytes, template

from llmtrain.ops.attention import attention_reference

EDGE = 512
"""M of the mask that is measured."""

LENGTH = 65_536

ONE_LEVEL = Tiling(large=(128, 128), small=(128, 128), strip=64)
"""Every small tile is handed over for itself."""


@dataclass
class MaskFound:
    """Bytes of both masks at LENGTH, and the blocks of a shorter sequence whose view was compared with the S x S mask."""

    dense: int
    tiled: int
    length: int
    blocks: int
    views: int


def mask(length: int) -> MaskFound:
    """Sizes at LENGTH, and every block at `length` against a real S x S mask. AssertionError for a wrong bit."""
    dense = template(-(-length // 2), dtype=torch.bool)[:length, :length]
    tiling = TilingMask(EDGE)
    blocks = views = 0
    for tile in Schedule(Mask(), queries=length, keys=length).tiles((EDGE, EDGE * 3 // 4)):
        want = dense[tile.rows.start : tile.rows.stop, tile.columns.start : tile.columns.stop]
        blocks += 1
        if tile.kind in (HIDDEN, VISIBLE):
            assert want.all() if tile.kind == HIDDEN else not want.any(), tile
            continue
        got = tiling.hidden(tile)
        assert torch.equal(got, want), tile
        views += got.untyped_storage().data_ptr() == tiling.template.untyped_storage().data_ptr()
    sizes = mask_bytes(LENGTH, EDGE)
    return MaskFound(sizes.dense, sizes.tiled, length, blocks, views)


@dataclass
class CountsFound:
    """One mask: a forward pass of one head with two levels of tiles, and with one."""

    name: str
    two: Counts
    one: Counts


def counts(length: int) -> list[CountsFound]:
    """Forward passes of one head of 128 of the reference, counted."""
    kinds = {"full": Mask(causal=False), "causal": Mask(), f"window {length // 4:,}": Mask(window=length // 4)}
    return [CountsFound(name, *(_counted(kind, length, tiling) for tiling in (Tiling(), ONE_LEVEL))) for name, kind in kinds.items()]


def _counted(kind: Mask, length: int, tiling: Tiling) -> Counts:
    found = Counts()
    q, k, v = (torch.randn(1, 1, length, 128) for _ in range(3))
    attention(q, k, v, mask=kind, tiling=tiling, counts=found)
    return found


def held(lengths: list[int]) -> list[tuple[int, int, int | None]]:
    """(tokens, bytes held at the peak by the tiled reference, by softmax with all scores), forward and backward, one head of 64, causal.

    The second is left out (None) beyond 4,096 tokens.
    """
    return [(n, _held(attention, n), _held(attention_reference, n) if n <= 4096 else None) for n in lengths]


def _held(function, length: int) -> int:
    q, k, v = (torch.randn(1, 1, length, 64, requires_grad=True) for _ in range(3))
    grad = torch.randn(1, 1, length, 64)
    with Held() as seen:
        torch.autograd.grad(function(q, k, v, mask=Mask()), (q, k, v), grad)
    return seen.peak
