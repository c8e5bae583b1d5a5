"""The CPU as a device."""

import os
import platform
import time
from contextlib import suppress
from functools import cache
from pathlib import Path

import psutil
import torch

from llmtrain.compat import cpu_multiplies_bf16
from llmtrain.device.base import Device, Memory


class CpuDevice(Device):
    """This process's share of the CPU. Memory is the process's resident set; peak FLOP/s are measured."""

    kind = "cpu"
    collective_backend = "gloo"

    def __init__(self, index: int = 0):
        self.index = index
        self.torch_device = torch.device("cpu")

    @classmethod
    def unavailable(cls) -> str | None:
        return None

    def count(self) -> int:
        return 1

    def set_current(self) -> None:
        return None

    def name(self) -> str:
        return _model_name()

    def unsupported_dtype(self, dtype: torch.dtype) -> str | None:
        return None

    def synchronize(self) -> None:
        return None

    def stream(self) -> None:
        return None

    def event(self) -> None:
        return None

    def memory(self) -> Memory:
        resident = psutil.Process().memory_info().rss
        return Memory(resident, max(resident, _peak_resident(resident)), psutil.virtual_memory().total)

    def reset_peak_memory(self) -> None:
        """Reset the kernel's high-water mark where it lets us (Linux); elsewhere the peak is the process's lifetime."""
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")

    def empty_cache(self) -> None:
        return None

    def seed(self, n: int) -> None:
        torch.manual_seed(n)

    def rng_state(self) -> dict[str, torch.Tensor]:
        return {"cpu": torch.get_rng_state()}

    def set_rng_state(self, state: dict[str, torch.Tensor]) -> None:
        torch.set_rng_state(state["cpu"])

    def peak_flops(self, dtype: torch.dtype) -> float | None:
        """FLOP/s of a square matrix product, the best of what fits in about 0.3 s, for the current number of threads (measured once)."""
        return _gemm_flops(dtype, torch.get_num_threads())

    def describe(self) -> str:
        bf16 = "bf16 instructions" if has_bf16_instructions() else "bf16 without instructions of its own (slow)"
        memory = psutil.virtual_memory().total / 2**30
        return f"cpu {self.name()}, {os.cpu_count()} logical cores, {memory:.0f} GiB, {bf16}"


@cache
def has_bf16_instructions() -> bool:
    """Whether the processor multiplies bf16 itself (AVX512-BF16, AMX or Arm BF16)."""
    return cpu_multiplies_bf16()


@cache
def _model_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor() or platform.machine()
    )


def _peak_resident(fallback: int) -> int:
    status = Path("/proc/self/status")
    if status.exists():
        return next((int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM")), fallback)
    try:
        import resource
    except ImportError:  # Windows
        return getattr(psutil.Process().memory_info(), "peak_wset", fallback)
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@cache
def _gemm_flops(dtype: torch.dtype, threads: int) -> float:
    size, best, spent = 1024, 0.0, 0.0
    a, b = (torch.full((size, size), 0.5, dtype=dtype) for _ in range(2))
    out = torch.mm(a, b)  # the first call loads and packs
    while spent < 0.3:
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        seconds = time.perf_counter() - start
        best, spent = max(best, 2 * size**3 / seconds), spent + seconds
    return best
