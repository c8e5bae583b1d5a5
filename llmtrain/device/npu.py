"""Huawei Ascend NPUs through torch_npu. Not run on hardware: tested against stand-ins only.

torch_npu registers itself when torch is imported. With torch_npu installed but no CANN, `import torch` itself fails, unless
TORCH_DEVICE_BACKEND_AUTOLOAD=0; with that set, nothing registers and this module imports torch_npu when the NPU is asked for.
"""

import importlib
import importlib.util
from functools import cache

import torch

from llmtrain.device.base import Accelerator


class NpuDevice(Accelerator):
    """One NPU through torch.npu and HCCL. Not run on hardware."""

    kind = "npu"
    collective_backend = "hccl"
    fix = (
        "Install CANN, run its set_env.sh, and install the torch_npu that matches torch "
        "(torch_npu 2.13.0 wants torch 2.13.0), or set device: cpu"
    )

    @classmethod
    def unavailable(cls) -> str | None:
        return _load() or (None if torch.get_device_module("npu").is_available() else "torch_npu finds no NPU")

    def unsupported_dtype(self, dtype: torch.dtype) -> str | None:
        if dtype == torch.float64:
            return "Ascend NPUs have no fp64 matrix product; use precision: fp32"
        return None


@cache
def _load() -> str | None:
    """Import torch_npu once; the reason if that fails."""
    if importlib.util.find_spec("torch_npu") is None:
        return "torch_npu is not installed"
    try:
        importlib.import_module("torch_npu")
    except (ImportError, OSError, RuntimeError) as error:
        return f"torch_npu does not load: {error}"
    return None
