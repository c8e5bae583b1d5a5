"""What memory bounds, in Triton, forward and backward, as operators of torch: RMSNorm, rotary embedding, SwiGLU, the softmax of
cross-entropy, rows sorted by expert.

    from llmtrain_kernels import triton_pointwise
    y = triton_pointwise.rms_norm(x, weight, 1e-6)

One pass over memory each way; computed in fp32, deterministic. Importing this package needs no Triton, calling its functions does.
"""

from llmtrain_kernels.triton_attention.available import unavailable
from llmtrain_kernels.triton_pointwise.cross_entropy import softmax_losses
from llmtrain_kernels.triton_pointwise.experts import permute, unpermute
from llmtrain_kernels.triton_pointwise.norm import WIDEST, rms_norm
from llmtrain_kernels.triton_pointwise.rope import rope
from llmtrain_kernels.triton_pointwise.swiglu import swiglu

__all__ = ["WIDEST", "permute", "rms_norm", "rope", "softmax_losses", "swiglu", "unavailable", "unpermute"]
