"""What a kernel is launched with: its arguments as C sees them (args.cuh), its grid and its shared memory."""

import ctypes
from dataclasses import dataclass

from torch import Tensor

ROWS = 128
"""Rows of a block, as in tile.cuh."""

THREADS = 128


class View(ctypes.Structure):
    """A tensor [batch, head, row, width] of fp16 with rows of consecutive numbers."""

    _fields_ = [("data", ctypes.c_uint64), ("batch", ctypes.c_int64), ("head", ctypes.c_int64), ("row", ctypes.c_int64)]

    @classmethod
    def of(cls, tensor: Tensor) -> "View":
        return cls(tensor.data_ptr(), *tensor.stride()[:3])


class Arguments(ctypes.Structure):
    """struct Args of args.cuh, which says what each field is."""

    _fields_ = [
        *((name, View) for name in ("x", "y", "c", "d", "out")),
        *((name, ctypes.c_uint64) for name in ("seen", "reach", "lse", "statistics")),
        *((name, ctypes.c_int64) for name in ("seen_batch", "reach_batch")),
        *((name, ctypes.c_int32) for name in ("rows", "cols", "padded", "query_heads", "group")),
        *((name, ctypes.c_float) for name in ("scale2", "before", "after")),
    ]


@dataclass(frozen=True)
class Kernel:
    """A kernel of attention.cu: how many row tiles it keeps and how many columns it takes at a time."""

    name: str
    row_tiles: int
    columns: int

    def shared_bytes(self, width: int) -> int:
        """Shared memory of a block: the row tiles, and two stages of two column tiles."""
        return 2 * width * (self.row_tiles * ROWS + 4 * self.columns)


KERNELS = {
    kernel.name: kernel
    for kernel in (
        Kernel("volta_forward", 1, 64),
        Kernel("volta_forward_half", 1, 64),
        Kernel("volta_grad_q", 2, 32),
        Kernel("volta_grad_k", 2, 32),
        Kernel("volta_grad_v", 1, 64),
    )
}


@dataclass(frozen=True)
class Launch:
    """One launch. `reads` and `writes` are the tensors that `arguments` points into; they live until it is done."""

    kernel: Kernel
    width: int
    arguments: Arguments
    blocks: tuple[int, int, int]
    reads: tuple[Tensor, ...]
    writes: tuple[Tensor, ...]

    @property
    def shared_bytes(self) -> int:
        return self.kernel.shared_bytes(self.width)
