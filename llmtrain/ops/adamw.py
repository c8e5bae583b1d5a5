"""AdamW (arXiv 1711.05101): torch's own, in its three forms."""

from typing import Any

import torch

from llmtrain.ops.registry import register

Groups = list[dict[str, Any]]
"""Each {"params": [...], "weight_decay": float}."""


@register("adamw", "fused", speed=2)
def adamw_fused(groups: Groups, *, lr: float, betas: tuple[float, float], eps: float) -> torch.optim.Optimizer:
    """torch.optim.AdamW(fused=True): one kernel per parameter (CPU) or list of parameters (CUDA, NPU)."""
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)


@register("adamw", "foreach", speed=1)
def adamw_foreach(groups: Groups, *, lr: float, betas: tuple[float, float], eps: float) -> torch.optim.Optimizer:
    """torch.optim.AdamW(foreach=True): one call per operation over all parameters."""
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, foreach=True)


@register("adamw", "loop", speed=0)
def adamw_loop(groups: Groups, *, lr: float, betas: tuple[float, float], eps: float) -> torch.optim.Optimizer:
    """torch.optim.AdamW, parameter by parameter: the reference."""
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, foreach=False, fused=False)
