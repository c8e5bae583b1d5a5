"""The configuration's names of number formats, as torch dtypes."""

import torch

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def torch_dtype(name: str) -> torch.dtype:
    """`fp64`, `fp32`, `bf16` or `fp16` as a torch dtype."""
    return DTYPES[name]
