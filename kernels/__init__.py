"""Kernels that stand on their own: usable without llmtrain, imported as `llmtrain_kernels`."""

from llmtrain_kernels.mask import Mask

__all__ = ["Mask"]
