"""FastAttention for Volta: CUDA C++ around the m8n8k4 tensor-core instruction, and what runs it. See README.md in this folder.

Not run on hardware: what has been checked, and how, is in README.md.
"""

from llmtrain_kernels.volta.attention import HEAD_DIMS, volta_attention

__all__ = ["HEAD_DIMS", "volta_attention"]
