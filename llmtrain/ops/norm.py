"""RMSNorm and LayerNorm: by the formula, and PyTorch's own."""

import torch
import torch.nn.functional as F
from torch import Tensor

from llmtrain.ops.registry import register


@register("rms_norm", "reference", speed=0)
def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dim, in fp32 or higher, returned in x's dtype (arXiv 1910.07467)."""
    high = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = high * torch.rsqrt(high.square().mean(-1, keepdim=True) + eps)
    return (normed * weight.to(high.dtype)).to(x.dtype)


@register("rms_norm", "native", speed=1)
def rms_norm_native(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """torch.nn.functional.rms_norm, which computes 16-bit input in fp32. The weight is taken in x's dtype, as its fused path needs."""
    return F.rms_norm(x, weight.shape, weight.to(x.dtype), eps)


@register("layer_norm", "reference", speed=0)
def layer_norm_reference(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias over the last dim, in fp32 or higher, returned in x's dtype (arXiv 1607.06450)."""
    high = x.to(torch.promote_types(x.dtype, torch.float32))
    centred = high - high.mean(-1, keepdim=True)
    normed = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps) * weight.to(high.dtype)
    return (normed if bias is None else normed + bias.to(high.dtype)).to(x.dtype)


@register("layer_norm", "native", speed=1)
def layer_norm_native(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """torch.nn.functional.layer_norm; weight and bias are taken in x's dtype, as its fused path needs."""
    return F.layer_norm(x, weight.shape, weight.to(x.dtype), None if bias is None else bias.to(x.dtype), eps)
