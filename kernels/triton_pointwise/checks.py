"""What all of these need."""

import torch
from llmtrain_kernels.triton_attention.available import unavailable
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check(op: str, *tensors: Tensor) -> None:
    """Raise ValueError for a dtype that is not computed in fp32, RuntimeError where Triton cannot run."""
    for x in tensors:
        if x.dtype not in DTYPES:
            raise ValueError(f"{op} in Triton: {x.dtype}; needed float32, bfloat16 or float16")
    reason = unavailable(tensors[0].device.type)
    if reason:
        raise RuntimeError(f"{op} in Triton {reason}")
