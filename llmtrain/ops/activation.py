"""SwiGLU and GELU."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from llmtrain.ops.registry import register


@register("swiglu", "reference", speed=0)
def swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, [..,F] each, in fp32 or higher, returned in gate's dtype (arXiv 2002.05202)."""
    high = torch.promote_types(gate.dtype, torch.float32)
    g = gate.to(high)
    return (g * torch.sigmoid(g) * up.to(high)).to(gate.dtype)


@register("swiglu", "native", speed=1)
def swiglu_native(gate: Tensor, up: Tensor) -> Tensor:
    """torch.nn.functional.silu(gate) * up."""
    return F.silu(gate) * up


@register("gelu", "reference", speed=0)
def gelu_reference(x: Tensor) -> Tensor:
    """The tanh form of GELU (arXiv 1606.08415, section 2), in fp32 or higher, returned in x's dtype."""
    high = x.to(torch.promote_types(x.dtype, torch.float32))
    inner = math.sqrt(2.0 / math.pi) * (high + 0.044715 * high**3)
    return (0.5 * high * (1.0 + torch.tanh(inner))).to(x.dtype)


@register("gelu", "native", speed=1)
def gelu_native(x: Tensor) -> Tensor:
    """torch.nn.functional.gelu(x, approximate="tanh")."""
    return F.gelu(x, approximate="tanh")
