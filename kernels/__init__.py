"""Kernels that stand on their own: usable without llmtrain, imported as `llmtrain_kernels`. kernels/README.md shows how."""

from llmtrain_kernels.mask import Mask
from llmtrain_kernels.tiling import Schedule, Tiling

__all__ = ["Mask", "Schedule", "Tiling"]
