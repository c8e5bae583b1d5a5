"""Normalisation modules over the op registry."""

import torch
from torch import Tensor, nn

from llmtrain.config.model import NormConfig


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dim [..,D]; the op computes in fp32 or higher (arXiv 1910.07467)."""

    def __init__(self, size: int, eps: float, *, ops):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps, self.ops = eps, ops

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """The norm of x; with `residual`, that of residual + x, and the sum itself, which one kernel may give together."""
        if residual is None:
            return self.ops.rms_norm(x, self.weight, self.eps)
        return self.ops.add_rms_norm(x, residual, self.weight, self.eps)


class LayerNorm(nn.Module):
    """(x - mean) / std * weight + bias over the last dim [..,D]."""

    def __init__(self, size: int, eps: float, *, ops):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.bias = nn.Parameter(torch.empty(size))
        self.eps, self.ops = eps, ops

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """As in RMSNorm."""
        total = x if residual is None else residual + x
        normed = self.ops.layer_norm(total, self.weight, self.bias, self.eps)
        return normed if residual is None else (normed, total)


def build_norm(cfg: NormConfig, size: int, *, ops) -> nn.Module:
    """The norm that `model.norm.kind` names, over a last dim of `size`."""
    return (RMSNorm if cfg.kind == "rms_norm" else LayerNorm)(size, cfg.eps, ops=ops)
