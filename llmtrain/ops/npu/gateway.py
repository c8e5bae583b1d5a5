"""The way to torch_npu's fused operators: found by name when they are called, so that nothing here needs torch_npu to be installed."""

import sys
from collections.abc import Callable
from typing import Any

import torch

NAME = "torch_npu"
"""What the implementations are called in the registry, after the library whose operators they are."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What the documentation in the wheel of torch_npu 2.13.0 gives for these operators on Atlas A2 and A3."""

SPEED = 10.0
"""Above whatever serves an NPU otherwise: one kernel instead of several. Not measured on hardware."""


def fused(name: str) -> Callable[..., Any]:
    """The operator npu::NAME. Its C++ schema checks names and types of arguments, but hardly any shape: callers check those."""
    return getattr(torch.ops.npu, name).default


def needs(*names: str) -> Callable[[], str | None]:
    """A probe for `register`: are these operators there?"""

    def probe() -> str | None:
        if "torch_npu" not in sys.modules:
            return "needs torch_npu, which is loaded when an NPU is selected"
        missing = [name for name in names if not hasattr(torch.ops.npu, name)]
        return f"needs {', '.join(missing)}, which the torch_npu here does not have" if missing else None

    return probe


def reject(op: str, found: str, needed: str) -> ValueError:
    """The error for a call that torch_npu would accept, and compute something else or fail in a kernel."""
    return ValueError(f"{op}: {found}; needed {needed}. Or choose another implementation with kernels.{op}")
