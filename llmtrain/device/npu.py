"""Huawei Ascend NPUs through torch_npu. Not run on hardware: tested with the real torch_npu over a stand-in for CANN (docs/npu.md).

torch_npu registers itself when torch is imported. With torch_npu installed but no CANN, `import torch` itself fails, unless
TORCH_DEVICE_BACKEND_AUTOLOAD=0, which llmtrain sets before it imports torch: this module imports torch_npu when an NPU is asked for.
"""

import importlib
import importlib.metadata
import importlib.util
import math
import os
from datetime import timedelta
from functools import cache
from typing import Any

import torch

from llmtrain import compat
from llmtrain.device.base import Accelerator
from llmtrain.hardware.cores import only_node

HUAWEI_ACCELERATOR = ("0x19e5", "0x1200")
"""PCI vendor, and class (processing accelerator), of an NPU in /sys/bus/pci/devices."""
CONNECT_SECONDS = (120, 7200)
"""What HCCL_CONNECT_TIMEOUT may be (CANN's reference of environment variables); the least is the default."""


class NpuDevice(Accelerator):
    """One NPU through torch.npu and HCCL. Not run on hardware."""

    kind = "npu"
    collective_backend = "hccl"
    fix = "docs/npu.md tells how to install CANN and the torch_npu that matches torch; or set device: cpu"

    @classmethod
    def unavailable(cls) -> str | None:
        return _load() or _no_npu()

    @classmethod
    def expected(cls) -> bool:
        return importlib.util.find_spec("torch_npu") is not None

    def unsupported_dtype(self, dtype: torch.dtype) -> str | None:
        if dtype == torch.float64:
            return "Ascend NPUs have no fp64 matrix product; use precision: fp32"
        if dtype == torch.bfloat16 and not self.module.is_bf16_supported():
            return f"{self.name()} has no bf16; use precision: fp16"
        return None

    def numa_node(self) -> int | None:
        """The NUMA node of all NPUs of this machine; None where they hang on several: torch_npu does not say which of them this is."""
        return only_node(*HUAWEI_ACCELERATOR)

    def deterministic(self, on: bool) -> None:
        """torch_npu passes torch's setting on to its kernels; HCCL, whose sums else depend on who arrives first, reads the environment."""
        if on:
            os.environ.setdefault("HCCL_DETERMINISTIC", "true")
        super().deterministic(on)

    def process_group_options(self, timeout: timedelta, *, buffer_mb: int | None = None) -> dict[str, Any]:
        limit_hccl(timeout)
        return {"pg_options": self.group_options(timeout, buffer_mb=buffer_mb)}

    def group_options(self, timeout: timedelta, *, buffer_mb: int | None = None) -> Any:
        """buffer_mb: half of what the group holds in device memory; None leaves it to HCCL_BUFFSIZE, which is 200 by default."""
        return compat.hccl_options(timeout, buffer_mb=buffer_mb)

    def describe(self) -> str:
        return f"{super().describe()}, torch_npu {importlib.metadata.version('torch_npu')}"


def limit_hccl(timeout: timedelta) -> None:
    """HCCL's own time-outs, as its environment variables, where the user has not set them: it has no option of a group for the first,
    and one for the second only in newer versions of CANN.

    Both become `timeout`: by default they are 120 s to connect and 1,836 s to wait, and a rank that compiles or reads for longer is taken
    for lost (EI0006).
    """
    seconds = math.ceil(timeout.total_seconds())
    least, most = CONNECT_SECONDS
    _set_unless_given("HCCL_CONNECT_TIMEOUT", str(min(max(seconds, least), most)))
    _set_unless_given("HCCL_EXEC_TIMEOUT", str(seconds))


_ours: dict[str, str] = {}
"""Environment variables that this process has set, which a later run in it may set anew; the user's stay."""


def _set_unless_given(name: str, value: str) -> None:
    if os.environ.get(name) in (None, _ours.get(name)):
        os.environ[name] = _ours[name] = value


def _no_npu() -> str | None:
    """Why torch_npu, which is loaded, has no NPU to offer."""
    if torch.get_device_module("npu").is_available():
        return None
    visible = os.environ.get("ASCEND_RT_VISIBLE_DEVICES")
    hint = "see `npu-smi info`" if visible is None else f"ASCEND_RT_VISIBLE_DEVICES is {visible!r}; see `npu-smi info`"
    return f"torch_npu finds no NPU ({hint})"


@cache
def _load() -> str | None:
    """Import torch_npu once; the reason if that fails."""
    if importlib.util.find_spec("torch_npu") is None:
        return "torch_npu is not installed"
    try:
        importlib.import_module("torch_npu")
    except Exception as error:  # torch_npu raises just that where CANN's folders are missing, ImportError or OSError for its libraries
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        return f"torch_npu does not load: {first}{_wrong_pair()}"
    return None


def _wrong_pair() -> str:
    """` (torch_npu 2.13.0 wants torch==2.13.0, this is torch 2.12.1)`, or nothing where the versions fit."""
    try:
        wanted = [line for line in importlib.metadata.requires("torch_npu") or [] if line.replace(" ", "").startswith("torch==")]
        installed = importlib.metadata.version("torch_npu")
    except importlib.metadata.PackageNotFoundError:  # a copy on the path that pip did not install
        return ""
    ours = torch.__version__.split("+")[0]
    fits = not wanted or wanted[0].replace(" ", "").removeprefix("torch==").removesuffix(".*") == ours
    return "" if fits else f" (torch_npu {installed} wants {wanted[0]}, this is torch {torch.__version__})"
