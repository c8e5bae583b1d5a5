"""Kernels that stand on their own: usable without llmtrain, imported as `llmtrain_kernels`."""

from llmtrain_kernels.mask import Mask
from llmtrain_kernels.tiled_reduce import attention_project_reduce, project_reduce

__all__ = ["Mask", "attention_project_reduce", "project_reduce"]
