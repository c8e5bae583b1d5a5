"""Flash attention in Triton, forward and backward: one source for CUDA from sm_80 on, Ascend, and Triton's interpreter on the CPU.

    from llmtrain_kernels import Mask, triton_attention
    out, lse = triton_attention.attention(q, k, v, mask=Mask(window=4096), return_lse=True)

Written within what triton-ascend 3.2 and current triton share. Importing this package needs no Triton; calling `attention` does.
On an NPU it has not been run: what was checked is said in `tiles`.
"""

from llmtrain_kernels.triton_attention.available import unavailable
from llmtrain_kernels.triton_attention.op import WIDEST, attention

__all__ = ["WIDEST", "attention", "unavailable"]
