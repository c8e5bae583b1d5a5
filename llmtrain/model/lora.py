"""Low-rank adapters beside frozen projections, put into a model from outside (LoRA, arXiv 2106.09685)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmtrain.config.lora import LoraConfig, adapted
from llmtrain.errors import UserError


class AdaptedLinear(nn.Linear):
    """x W^T + bias + scale (x A^T) B^T: [..,inputs] -> [..,outputs], with `lora_a` [rank,inputs] and `lora_b` [outputs,rank].

    Takes over the parameters of `linear`, whose names stay.
    """

    def __init__(self, linear: nn.Linear, *, rank: int, scale: float):
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.scale = linear.in_features, linear.out_features, scale
        self.weight, self.bias = linear.weight, linear.bias
        like = {"dtype": linear.weight.dtype, "device": linear.weight.device}
        self.lora_a = nn.Parameter(torch.empty(rank, linear.in_features, **like))
        self.lora_b = nn.Parameter(torch.empty(linear.out_features, rank, **like))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias) + F.linear(F.linear(x, self.lora_a) * self.scale, self.lora_b)


def add_adapters(model: nn.Module, lora: LoraConfig) -> None:
    """Freeze `model` (whole, before anything is applied to it) and give the projections that `lora` names adapters, which are left empty.

    Frozen parameters have no gradient and no moments. Raises UserError for a family without such projections.
    """
    model.requires_grad_(False)
    modules = dict(model.named_modules())
    for name in adapted(lora, model.cfg):
        linear = modules.get(name)
        if not isinstance(linear, nn.Linear):
            raise UserError(f"lora.rank {lora.rank}: {type(model).__name__} has no projection {name}; set lora.targets or lora.rank 0")
        parent, _, own = name.rpartition(".")
        setattr(modules[parent], own, AdaptedLinear(linear, rank=lora.rank, scale=lora.scale))
