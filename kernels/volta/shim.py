"""The kernels on a CPU: attention.cu compiled by g++ against host_shim/. It checks the source; it is no way to compute attention."""

import ctypes
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from llmtrain_kernels.volta.arguments import THREADS, Launch
from llmtrain_kernels.volta.sources import FOLDER, cached, fingerprint
from torch import Tensor


class ShimError(RuntimeError):
    """The kernel did what a GPU would not survive, or would do in silence: the message says which thread and what."""


class Report(ctypes.Structure):
    """What a launch did, counted by warps: `conflicts` are the wavefronts of shared memory beyond the least number."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("loads", "stores", "conflicts", "products", "barriers")),
        ("error", ctypes.c_char * 256),
    ]


class _Range(ctypes.Structure):
    _fields_ = [("first", ctypes.c_uint64), ("end", ctypes.c_uint64), ("writable", ctypes.c_int)]


_watchers: list[list[tuple[Launch, Report]]] = []


def compiler() -> str | None:
    """The C++ compiler, or None."""
    return shutil.which(os.environ.get("CXX", "g++"))


@contextmanager
def watch() -> Iterator[list[tuple[Launch, Report]]]:
    """Every launch within, with its report."""
    seen: list[tuple[Launch, Report]] = []
    _watchers.append(seen)
    try:
        yield seen
    finally:
        _watchers.remove(seen)


def build(width: int, folder: Path = FOLDER) -> Path:
    """Compile the sources in `folder` for one head dim; the library's path. Raises RuntimeError with the compiler's output."""
    if compiler() is None:
        raise RuntimeError("the Volta kernels run on a CPU only through a host shim, which needs g++ (or the compiler that CXX names)")
    command = [compiler(), "-std=c++17", "-O2", "-fPIC", "-shared", "-fno-strict-aliasing", "-U_FORTIFY_SOURCE", "-Wno-unknown-pragmas"]
    command += [
        f"-DHEAD_DIM={width}",
        f"-I{folder / 'host_shim'}",
        "-x",
        "c++",
        str(folder / "attention.cu"),
        str(folder / "host_shim/shim.cpp"),
    ]
    return cached(fingerprint(folder, [*command[1:8], width]), ".so", lambda: _compile(command))


def _compile(command: list[str]) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "shim.so"
        done = subprocess.run([*command, "-o", str(library)], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{command[0]} could not compile the Volta kernels for the CPU:\n{done.stderr[-2000:]}")
        return library.read_bytes()


@cache
def library(width: int, folder: Path = FOLDER) -> ctypes.CDLL:
    """The sources in `folder`, compiled and loaded."""
    return ctypes.CDLL(str(build(width, folder)))


def launch(call: Launch, folder: Path = FOLDER) -> Report:
    """Run a launch whose tensors are in host memory. Raises ShimError for what a GPU would do wrongly or not at all."""
    loaded, report = library(call.width, folder), Report()
    ranges = [_range(x, writable) for writable, tensors in ((0, call.reads), (1, call.writes)) for x in tensors]
    kernel = ctypes.cast(getattr(loaded, call.kernel.name), ctypes.c_void_p)
    loaded.volta_shim_launch(
        kernel,
        ctypes.byref(call.arguments),
        (ctypes.c_uint * 3)(*call.blocks),
        THREADS,
        call.shared_bytes,
        (_Range * len(ranges))(*ranges),
        len(ranges),
        ctypes.byref(report),
    )
    for seen in _watchers:
        seen.append((call, report))
    if report.error:
        raise ShimError(f"{call.kernel.name}: {report.error.decode()}")
    return report


def _range(x: Tensor, writable: int) -> _Range:
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride()))
    return _Range(x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size(), writable)
