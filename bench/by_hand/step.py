"""What every script does after the backward pass: report the loss, clip, AdamW."""

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from train_peers import shape as s


def adamw(model: nn.Module) -> torch.optim.AdamW:
    """torch's fused AdamW."""
    return torch.optim.AdamW(model.parameters(), lr=s.LR, betas=s.BETAS, eps=s.EPS, weight_decay=s.WEIGHT_DECAY, fused=True)


def square(gradients: Sequence[Tensor]) -> float:
    """The sum of squares of these gradients' local parts."""
    return torch.nn.utils.get_total_norm([local(gradient) for gradient in gradients]).item() ** 2 if gradients else 0.0


@torch.no_grad()
def finish(optimizer: torch.optim.Optimizer, *, loss: float, squares: float) -> float:
    """Sum loss and squares over all ranks in one message, clip, step; returns the loss of all ranks."""
    both = torch.tensor([loss, squares], dtype=torch.float64)
    dist.all_reduce(both)
    loss, norm = both[0].item(), math.sqrt(both[1].item())
    if norm > s.CLIP:
        gradients = [local(p.grad) for group in optimizer.param_groups for p in group["params"]]
        torch._foreach_mul_(gradients, s.CLIP / norm)
    optimizer.step()
    optimizer.zero_grad()
    return loss


def local(tensor: Tensor) -> Tensor:
    """This rank's part."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
