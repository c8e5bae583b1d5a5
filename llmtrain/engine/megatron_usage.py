"""How a step uses the experts under the engine megatron: what its routers count, put together as the engine native reports it.

Imports megatron-core, so it is imported when an engine is built.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llmtrain.config.model import ModelConfig
from llmtrain.engine.expert_usage import shares_of
from llmtrain.engine.megatron_modules import Router
from llmtrain.parallel.hang.where import recorded
from llmtrain.parallel.mesh import Mesh


def build_usage(models: dict[int, nn.Module], model: ModelConfig, mesh: Mesh) -> "RouterUsage | None":
    """For the stages of this rank; None for a model without experts."""
    return RouterUsage(models, model, mesh) if model.ffn.kind == "moe" else None


class RouterUsage:
    """Reads the routers of this rank's stages after the forward passes of a step.

    L layers of the whole model, those of multi-token prediction last; E experts.
    """

    def __init__(self, models: dict[int, nn.Module], model: ModelConfig, mesh: Mesh):
        self.ffn, self.mesh = model.ffn, mesh
        self.adds = model.ffn.balance is not None or model.ffn.router.z_loss > 0
        """Whether there is a loss."""
        self.layers = model.expert_layers + model.mtp.heads
        self.routers: dict[int, Router] = {}
        """The routers of this rank by number."""
        for stage in models.values():
            for layer in stage.decoder.layers:
                self._add(layer.layer_number - 1 - self.ffn.dense_layers, layer)
            for head, ahead in enumerate(getattr(getattr(stage, "mtp", None), "layers", ())):
                self._add(model.expert_layers + head, ahead.transformer_layer)
        self.totals: Tensor | None = None
        """[L,E] int64 of the last step, the same on every rank: choices of each expert."""

    def _add(self, number: int, layer: nn.Module) -> None:
        router = getattr(layer.mlp, "router", None)
        if router is not None:
            self.routers[number] = router

    def begin_step(self) -> None:
        """Count from nothing."""
        for router in self.routers.values():
            router.counts, router.losses = None, 0.0

    def end_step(self) -> list[float]:
        """Sum up the counts over all ranks; returns this rank's share of the losses and of the norms of biases by layer, to be summed over
        all."""
        totals = torch.zeros(self.layers, self.ffn.experts, dtype=torch.int64, device=self.mesh.device.torch_device)
        for number, router in self.routers.items():
            totals[number] = router.counts
        if self.mesh.world > 1:
            with recorded("all_reduce", "world"):
                dist.all_reduce(totals)
        self.totals = totals
        losses = sum(float(router.losses) for router in self.routers.values())
        return [losses, *(self._biases() if self.ffn.router.bias_rate is not None else [])]

    def _biases(self) -> list[float]:
        norms = [0.0] * self.layers
        if not any(map(self.mesh.place, ("dp_replicate", "dp_shard", "cp", "tp"))):
            for number, router in self.routers.items():
                norms[number] = float(router.expert_bias.norm())
        return norms

    def metrics(self, sums: list[float]) -> dict[str, Any]:
        """Of the last step: as the engine native has them. `sums` are those of `end_step` over all ranks."""
        none_dropped = torch.zeros(self.layers, 1, dtype=torch.int64, device=self.totals.device)
        layers = shares_of(torch.cat((self.totals, none_dropped), 1), self.ffn) | ({"bias": sums[1:]} if len(sums) > 1 else {})
        return ({"balance_loss": sums[0]} if self.adds else {}) | {"experts": layers}
