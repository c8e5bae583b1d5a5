"""NVIDIA GPUs, Volta included."""

import os
from datetime import timedelta
from typing import Any

import torch

from llmtrain.device.base import Accelerator
from llmtrain.hardware.cores import pci_node


class CudaDevice(Accelerator):
    """One GPU through torch.cuda and NCCL."""

    kind = "cuda"
    collective_backend = "nccl"
    fix = "Install a CUDA build of torch that fits the driver (Volta: the cu126 build), or set device: cpu"

    @classmethod
    def unavailable(cls) -> str | None:
        if torch.version.cuda is None:
            return f"this torch ({torch.__version__}) is built without CUDA"
        return None if torch.cuda.is_available() else f"torch {torch.__version__} (CUDA {torch.version.cuda}) finds no GPU or no driver"

    def capability(self) -> tuple[int, int]:
        return torch.cuda.get_device_capability(self.index)

    def unsupported_dtype(self, dtype: torch.dtype) -> str | None:
        return unsupported_dtype(dtype, self.capability())

    def numa_node(self) -> int | None:
        place = torch.cuda.get_device_properties(self.index)
        parts = [getattr(place, f"pci_{part}_id", None) for part in ("domain", "bus", "device")]
        return None if None in parts else pci_node("{:04x}:{:02x}:{:02x}.0".format(*parts))

    def deterministic(self, on: bool) -> None:
        if on:  # cuBLAS asks for it: torch.use_deterministic_algorithms
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        super().deterministic(on)

    def process_group_options(self, timeout: timedelta, *, buffer_mb: int | None = None) -> dict[str, Any]:
        return {"device_id": self.torch_device}

    def describe(self) -> str:
        major, minor = self.capability()
        return f"{super().describe()}, capability {major}.{minor}, CUDA {torch.version.cuda}"


def unsupported_dtype(dtype: torch.dtype, capability: tuple[int, int]) -> str | None:
    """Why a GPU of this compute capability should not compute in `dtype`, or None. Before 8.0 bf16 is emulated, and slower than fp32."""
    if dtype != torch.bfloat16 or capability >= (8, 0):
        return None
    names = {(7, 0): "Volta", (7, 5): "Turing"}
    return f"{names.get(capability, f'compute capability {capability[0]}.{capability[1]}')} has no bf16; use precision: fp16"
