"""attention.cpp on a CPU, compiled by g++ against host_shim/. It checks the source; it is no way to compute attention."""

import ctypes
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
from llmtrain_kernels.contract import check_attention
from llmtrain_kernels.mask import Mask
from llmtrain_kernels.tiling import Tiling
from llmtrain_kernels.tiling_mask import template
from torch import Tensor

FOLDER = Path(__file__).parent
WIDTHS = (64, 128)
TILING = Tiling(large=(256, 256), small=(128, 128), strip=16, depth=128)
"""As in tiles.h."""

FLAGS = ("scores", "weights", "values")
WAYS = ("memory > L1", "L1 > L0", "L0 > memory", "memory > UB", "mask > UB", "UB > memory")
PLACES = ("UB", "L1", "L0A", "L0B", "L0C")


class ShimError(RuntimeError):
    """The kernel did what an NPU would not survive, or would do in silence: the message says which core and what."""


class Report(ctypes.Structure):
    """What a launch did. `flags`: sets, two Vector cores counting as one; `products`: Mmad calls; `peak`: bytes of a core's buffers."""

    _fields_ = [
        ("flags", ctypes.c_int64 * 11),
        ("products", ctypes.c_int64),
        ("moved", ctypes.c_int64 * len(WAYS)),
        ("peak", ctypes.c_int64 * len(PLACES)),
        ("error", ctypes.c_char * 256),
    ]

    def by_flag(self) -> dict[str, int]:
        """How often each flag was set."""
        return dict(zip(FLAGS, self.flags))

    def by_way(self) -> dict[str, int]:
        """Bytes moved."""
        return dict(zip(WAYS, self.moved))

    def by_place(self) -> dict[str, int]:
        """Bytes of buffers."""
        return dict(zip(PLACES, self.peak))


class _Arguments(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "mask", "workspace", "out", "lse")),
        *((name, ctypes.c_uint32) for name in ("batch", "heads", "kv_heads", "queries", "keys", "q_offset", "causal", "width")),
        ("scale", ctypes.c_float),
    ]


_watchers: list[list[Report]] = []


def compiler() -> str | None:
    """The C++ compiler, or None."""
    return shutil.which(os.environ.get("CXX", "g++"))


@contextmanager
def watch() -> Iterator[list[Report]]:
    """The report of every launch within."""
    seen: list[Report] = []
    _watchers.append(seen)
    try:
        yield seen
    finally:
        _watchers.remove(seen)


@cache
def library(folder: Path = FOLDER, level: str = "-O2") -> ctypes.CDLL:
    """The sources in `folder`, compiled at an optimisation level and loaded. Raises RuntimeError with the compiler's output."""
    if compiler() is None:
        raise RuntimeError("the Ascend C kernel runs on a CPU only through a host shim, which needs g++ (or the compiler that CXX names)")
    command = [compiler(), "-std=c++17", level, "-ftree-vectorize", "-fPIC", "-shared", "-U_FORTIFY_SOURCE", "-Wno-unknown-pragmas"]
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "shim.so"
        source = folder / "host_shim/launch.cpp"
        done = subprocess.run([*command, f"-I{folder / 'host_shim'}", str(source), "-o", str(path)], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{command[0]} could not compile the Ascend C kernel for the CPU:\n{done.stderr[-2000:]}")
        loaded = ctypes.CDLL(str(path))
    loaded.ascend_c_workspace.restype = ctypes.c_uint64
    return loaded


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask,
    scale: float | None = None,
    q_offset: int = 0,
    kv_offset: int = 0,
    return_lse: bool = False,
    cores: int = 2,
    loaded: ctypes.CDLL | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention on `cores` AI cores of the shim, forward only: fp16 in host memory, causal or full, head dim 64 or 128.

    q [B,H,S,d], k and v [B,K,T,d]; returns out [B,H,S,d] and, if asked, lse [B,H,S] in fp32. `loaded`: a library other than that of
    these sources. Raises ValueError for other calls, ShimError for what an NPU would do wrongly or not at all.
    """
    check_attention(q, k, v, mask, q_offset=q_offset, kv_offset=kv_offset)
    _check_served(q, v, mask, kv_offset)
    q, k, v = (x.detach().contiguous() for x in (q, k, v))
    out, lse = torch.full_like(q, float("nan")), q.new_full(q.shape[:3], float("nan"), dtype=torch.float32)
    loaded, report = loaded or library(), Report()
    hidden = template(min(TILING.small), dtype=q.dtype)
    workspace = torch.empty(cores * loaded.ascend_c_workspace(q.shape[3]), dtype=torch.uint8)
    pointers = (x.data_ptr() for x in (q, k, v, hidden, workspace, out, lse))
    numbers = (*q.shape[:2], k.shape[1], q.shape[2], k.shape[2], q_offset, mask.causal, q.shape[3])
    call = _Arguments(*pointers, *numbers, q.shape[-1] ** -0.5 if scale is None else scale)
    loaded.ascend_c_launch(ctypes.byref(call), cores, ctypes.byref(report))
    for seen in _watchers:
        seen.append(report)
    if report.error:
        raise ShimError(report.error.decode())
    return (out, lse) if return_lse else out


def _check_served(q: Tensor, v: Tensor, mask: Mask, kv_offset: int) -> None:
    if q.dtype != torch.float16 or q.device.type != "cpu":
        raise ValueError(f"attention: {q.dtype} on {q.device}; the Ascend C kernel in its shim takes fp16 on the CPU")
    if q.shape[-1] not in WIDTHS or v.shape[-1] != q.shape[-1]:
        raise ValueError(f"attention: head dims {q.shape[-1]} and {v.shape[-1]}; the Ascend C kernel takes {WIDTHS}, both the same")
    if mask.documents is not None or mask.window is not None or kv_offset:
        raise ValueError(f"attention: {mask}, kv_offset={kv_offset}; the Ascend C kernel is causal or full, without documents or window")
