"""The ops a model is built from, each with several implementations; see `registry` and docs/kernels.md.

Importing this package registers the implementations that need nothing but PyTorch, and those of torch_npu, which are probed when asked for.
"""

from llmtrain_kernels.mask import Mask

from llmtrain.ops import (
    activation,
    adamw,
    apex,
    attention,
    attention_parts,
    cross_entropy,
    decode_attention,
    experts,
    fast_attention,
    fast_reference,
    flex_attention,
    liger,
    norm,
    npu,
    outside_attention,
    rope,
    sdpa,
    tiled_attention,
    transformer_engine,
    triton_pointwise,
    volta_attention,
)
from llmtrain.ops.decode_attention import KeyLengths
from llmtrain.ops.registry import Call, Choice, Implementation, KernelUnavailable, Ops, choose, implementations, op_names, register, resolve

__all__ = [
    "Call",
    "Choice",
    "Implementation",
    "KernelUnavailable",
    "KeyLengths",
    "Mask",
    "Ops",
    "activation",
    "adamw",
    "apex",
    "attention",
    "attention_parts",
    "choose",
    "cross_entropy",
    "decode_attention",
    "experts",
    "fast_attention",
    "fast_reference",
    "flex_attention",
    "implementations",
    "liger",
    "norm",
    "npu",
    "op_names",
    "outside_attention",
    "register",
    "resolve",
    "rope",
    "sdpa",
    "tiled_attention",
    "transformer_engine",
    "triton_pointwise",
    "volta_attention",
]
