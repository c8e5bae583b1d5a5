"""Block sizes by chip, kernel, head dims and dtype.

CUDA: reasoned from shared memory and registers, and compiled (docs/triton-kernels.md has what that showed); untuned, no GPU has timed them.
Ascend: chosen by compiling, not run on hardware: of the candidates that `llmtrain_kernels.triton_attention.ascend --search` tries, the
largest that fits the buffers of the chip, and of two equal ones the squarer; for head dims of 256 one that fits.
"""

from collections.abc import Mapping
from typing import NamedTuple, TypeVar

FORWARD, BACKWARD_Q, BACKWARD_KV, DELTA = KERNELS = ("forward", "backward_q", "backward_kv", "delta")


class Tile(NamedTuple):
    """Queries and keys of a tile, and what CUDA's compiler is told: warps of a block, stages of its pipeline of loads."""

    queries: int
    keys: int
    warps: int = 4
    stages: int = 1


Widths = Mapping[int, Tile]
"""Row of a table (see `width`) -> tile."""


def padded(size: int) -> int:
    """The power of two, at least 16, that holds a head dim: products need it."""
    return max(16, 1 << (size - 1).bit_length())


def width(d: int, dv: int) -> int:
    """What a tile has to hold of a row: the padded head dims of q and v together, 128 for 64 and 384 for 192 with 128."""
    return max(padded(d), padded(dv)) + padded(dv)


NARROW: Mapping[str, Mapping[str, Widths]] = {
    "sm_80": {
        FORWARD: {128: Tile(128, 64, 8, 3), 256: Tile(128, 32, 8, 3), 384: Tile(64, 32, 4, 2), 512: Tile(64, 32, 8, 2)},
        BACKWARD_Q: {128: Tile(128, 64, 8, 2), 256: Tile(64, 64, 8, 2), 384: Tile(64, 32, 8, 1), 512: Tile(64, 32, 8, 1)},
        BACKWARD_KV: {128: Tile(64, 128, 8, 2), 256: Tile(32, 64, 4, 2), 384: Tile(32, 64, 8, 1), 512: Tile(32, 64, 8, 1)},
    },
    "sm_90": {
        FORWARD: {128: Tile(128, 128, 8, 2), 256: Tile(128, 64, 8, 3), 384: Tile(128, 64, 8, 2), 512: Tile(64, 64, 8, 2)},
        BACKWARD_Q: {128: Tile(128, 64, 8, 2), 256: Tile(128, 64, 8, 2), 384: Tile(64, 32, 4, 1), 512: Tile(64, 32, 8, 1)},
        BACKWARD_KV: {128: Tile(64, 128, 8, 2), 256: Tile(64, 64, 8, 2), 384: Tile(32, 64, 8, 2), 512: Tile(32, 32, 8, 1)},
    },
    "sm_86": {
        FORWARD: {128: Tile(128, 64, 8, 2), 256: Tile(64, 32, 4, 2), 384: Tile(64, 32, 4, 1), 512: Tile(64, 32, 8, 1)},
        BACKWARD_Q: {128: Tile(64, 64, 4, 2), 256: Tile(64, 32, 4, 2), 384: Tile(32, 32, 4, 1), 512: Tile(32, 32, 4, 1)},
        BACKWARD_KV: {128: Tile(32, 64, 4, 2), 256: Tile(32, 64, 4, 2), 384: Tile(32, 32, 4, 1), 512: Tile(32, 32, 4, 1)},
    },
    "Ascend910B": {
        FORWARD: {256: Tile(128, 128), 384: Tile(128, 128), 512: Tile(64, 128)},
        BACKWARD_Q: {256: Tile(128, 128), 384: Tile(64, 256), 512: Tile(64, 256)},
        BACKWARD_KV: {128: Tile(128, 128), 256: Tile(256, 64), 384: Tile(128, 64), 512: Tile(128, 32)},
    },
    "interpreter": {kernel: {512: Tile(32, 32)} for kernel in KERNELS},
}
"""Tiles of inputs of 16 bits."""

WIDE: Mapping[str, Mapping[str, Widths]] = {
    **{
        chip: {
            FORWARD: {128: Tile(64, 32, 4, 2), 256: Tile(32, 32, 4, 2), 512: Tile(32, 16, 4, 1)},
            BACKWARD_Q: {128: Tile(32, 32, 4, 2), 256: Tile(32, 32, 4, 1), 512: Tile(16, 16, 4, 1)},
            BACKWARD_KV: {128: Tile(32, 32, 4, 2), 256: Tile(32, 32, 4, 1), 512: Tile(16, 16, 4, 1)},
        }
        for chip in ("sm_80", "sm_86", "sm_90")
    },
    "Ascend910B": {**NARROW["Ascend910B"], BACKWARD_Q: {256: Tile(128, 128), 384: Tile(64, 256), 512: Tile(64, 128)}},
    "interpreter": NARROW["interpreter"],
}
"""Tiles of fp32 inputs, whose products stay in fp32: without tensor cores on CUDA, so for correctness rather than speed."""

DELTA_ROWS = {64: 128, 128: 64, 256: 32}
"""Rows of a block of the kernel `delta`, by padded head dim of v."""


def tile(chip: str, kernel: str, *, d: int, dv: int, itemsize: int) -> Tile:
    """The tile of a kernel. Raises ValueError for a head dim above 256 or a chip without tiles."""
    if chip not in NARROW:
        raise ValueError(f"attention in Triton has no tiles for {chip}; it has for {', '.join(NARROW)}")
    if kernel == DELTA:
        return Tile(_first(DELTA_ROWS, padded(dv)), 0)
    return _first((NARROW if itemsize == 2 else WIDE)[chip][kernel], width(d, dv))


Found = TypeVar("Found")


def _first(table: Mapping[int, Found], size: int) -> Found:
    for limit, found in table.items():
        if size <= limit:
            return found
    raise ValueError("attention in Triton takes head dims up to 256")


def cuda_chip(capability: tuple[int, int]) -> str:
    """The key of the tables for a compute capability from 8.0 on. Those with 100 KB of shared memory a block have small tiles."""
    if capability == (9, 0):
        return "sm_90"
    return "sm_80" if capability in ((8, 0), (8, 7), (10, 0), (10, 3)) else "sm_86"


def ascend_chip(name: str) -> str:
    """The key for a name of a chip such as Ascend910B2 or Ascend910_9391 (Atlas A2 and A3: cores and buffers are the same)."""
    return "Ascend910B" if name.startswith(("Ascend910B", "Ascend910_93")) else name
