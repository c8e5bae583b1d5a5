"""Block sizes by chip, kernel, head dim and dtype.

CUDA: reasoned from the shared memory and registers of a chip, and compiled; untuned, no GPU has timed them. Ascend: chosen by compiling,
not run on hardware: `llmtrain_kernels.triton_attention.ascend` tries candidates, and the largest that fits the buffers is shipped.
"""

from collections.abc import Mapping
from typing import NamedTuple

FORWARD, BACKWARD_Q, BACKWARD_KV, DELTA = KERNELS = ("forward", "backward_q", "backward_kv", "delta")


class Tile(NamedTuple):
    """Queries and keys of a tile, and what CUDA's compiler is told: warps of a block, stages of its pipeline of loads."""

    queries: int
    keys: int
    warps: int = 4
    stages: int = 1


Widths = Mapping[int, Tile]
"""Wider of the two padded head dims -> tile."""


def padded(width: int) -> int:
    """The power of two, at least 16, that holds a head dim: products need it."""
    return max(16, 1 << (width - 1).bit_length())


NARROW: Mapping[str, Mapping[str, Widths]] = {
    "sm_80": {
        FORWARD: {64: Tile(128, 64, 4, 3), 128: Tile(128, 64, 8, 2), 256: Tile(64, 32, 4, 2)},
        BACKWARD_Q: {64: Tile(128, 64, 8, 2), 128: Tile(64, 64, 8, 2), 256: Tile(64, 32, 8, 1)},
        BACKWARD_KV: {64: Tile(64, 128, 8, 2), 128: Tile(32, 128, 8, 2), 256: Tile(32, 64, 8, 1)},
    },
    "sm_90": {
        FORWARD: {64: Tile(128, 128, 8, 2), 128: Tile(128, 128, 8, 2), 256: Tile(128, 64, 8, 2)},
        BACKWARD_Q: {64: Tile(128, 64, 8, 2), 128: Tile(128, 64, 8, 2), 256: Tile(64, 64, 8, 1)},
        BACKWARD_KV: {64: Tile(64, 128, 8, 2), 128: Tile(64, 128, 8, 2), 256: Tile(64, 64, 8, 1)},
    },
    "sm_86": {
        FORWARD: {64: Tile(128, 64, 4, 2), 128: Tile(64, 64, 4, 2), 256: Tile(64, 32, 4, 1)},
        BACKWARD_Q: {64: Tile(64, 64, 4, 2), 128: Tile(64, 32, 4, 2), 256: Tile(32, 32, 4, 1)},
        BACKWARD_KV: {64: Tile(64, 64, 4, 2), 128: Tile(32, 64, 4, 2), 256: Tile(32, 32, 4, 1)},
    },
    "Ascend910B": {
        FORWARD: {64: Tile(128, 128), 128: Tile(64, 128), 256: Tile(64, 64)},
        BACKWARD_Q: {64: Tile(64, 64), 128: Tile(64, 64), 256: Tile(32, 32)},
        BACKWARD_KV: {64: Tile(64, 64), 128: Tile(64, 64), 256: Tile(32, 32)},
    },
    "interpreter": {kernel: {256: Tile(32, 32)} for kernel in KERNELS},
}
"""Tiles of inputs of 16 bits."""

WIDE: Mapping[str, Mapping[str, Widths]] = {
    **{
        chip: {
            FORWARD: {64: Tile(64, 32, 4, 2), 128: Tile(32, 32, 4, 2), 256: Tile(32, 16, 4, 1)},
            BACKWARD_Q: {64: Tile(32, 32, 4, 2), 128: Tile(32, 32, 4, 1), 256: Tile(16, 16, 4, 1)},
            BACKWARD_KV: {64: Tile(32, 32, 4, 2), 128: Tile(32, 32, 4, 1), 256: Tile(16, 16, 4, 1)},
        }
        for chip in ("sm_80", "sm_86", "sm_90")
    },
    "Ascend910B": {
        FORWARD: {64: Tile(64, 64), 128: Tile(64, 64), 256: Tile(32, 32)},
        BACKWARD_Q: {64: Tile(64, 32), 128: Tile(32, 32), 256: Tile(16, 16)},
        BACKWARD_KV: {64: Tile(64, 32), 128: Tile(32, 32), 256: Tile(16, 16)},
    },
    "interpreter": NARROW["interpreter"],
}
"""Tiles of fp32 inputs, whose products stay in fp32: without tensor cores on CUDA, so for correctness rather than speed."""

DELTA_ROWS = {64: 128, 128: 64, 256: 32}
"""Rows of a block of the kernel `delta`, by padded head dim of v."""


def tile(chip: str, kernel: str, *, d: int, dv: int, itemsize: int) -> Tile:
    """The tile of a kernel. Raises ValueError for a head dim above 256 or a chip without tiles."""
    widest = max(padded(d), padded(dv))
    if chip not in NARROW:
        raise ValueError(f"kernels.attention=fast has no tiles for {chip}; it has for {', '.join(NARROW)}")
    if kernel == DELTA:
        return Tile(DELTA_ROWS[next(width for width in DELTA_ROWS if width >= padded(dv))], 0)
    for width, found in (NARROW if itemsize == 2 else WIDE)[chip][kernel].items():
        if widest <= width:
            return found
    raise ValueError(f"kernels.attention=fast takes head dims up to 256, not {max(d, dv)}")


def cuda_chip(capability: tuple[int, int]) -> str:
    """The key of the tables for a compute capability from 8.0 on. Those with 100 KB of shared memory a block have small tiles."""
    if capability == (9, 0):
        return "sm_90"
    return "sm_80" if capability in ((8, 0), (8, 7), (10, 0), (10, 3)) else "sm_86"


def ascend_chip(name: str) -> str:
    """The key for a name of a chip such as Ascend910B2 or Ascend910_9391 (Atlas A2 and A3: cores and buffers are the same)."""
    return "Ascend910B" if name.startswith(("Ascend910B", "Ascend910_93")) else name
