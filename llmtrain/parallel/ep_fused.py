"""Expert parallelism whose exchanges are part of the products beside them: `parallel.ep_kind: fused`, in the place of RoutedExperts.

Where `all_to_all` sends, multiplies three times and sends back, this makes two operators of a send and a product each, and one product
between them. Not run on hardware.
"""

from functools import partial

import torch.distributed as dist
from torch import Tensor

from llmtrain.config.ffn import MoEConfig
from llmtrain.config.train import TrainConfig
from llmtrain.errors import UserError
from llmtrain.model.experts import Experts, Meanwhile
from llmtrain.parallel.ops.choice import Chosen
from llmtrain.parallel.ops.npu_experts import Exchange, alltoallv_matmul, matmul_alltoallv
from llmtrain.parallel.ops.npu_limits import ExchangeDemand, generation_of, refuse_exchange


class FusedExperts:
    """Called as RoutedExperts: x [N,D], probs [N,k], ids [N,k] -> [N,D]. Expert r E / ranks is the first that rank r of `group` holds."""

    def __init__(self, experts: Experts, group: dist.ProcessGroup, count: int):
        self.experts, self.group, self.count = experts, group, count
        self.slots: Tensor | None = None
        """As in PlacedDispatcher; None where experts stand in the slots of their numbers."""
        # Through the module's own call, in which FSDP2 gathers its parameters.
        experts.forward = partial(_through_experts, experts)

    def __call__(self, x: Tensor, probs: Tensor, ids: Tensor, *, meanwhile: Meanwhile | None = None) -> Tensor:
        ops, ids = self.experts.ops, ids if self.slots is None else self.slots[ids]
        rows, order, counts = ops.permute(x, ids, self.count)  # [N k,D], sorted by expert and so by rank
        results = self.experts(rows, Exchange.of(counts, self.group, ops.grouped_mm))
        return ops.unpermute(results, order, probs)


def _through_experts(experts: Experts, rows: Tensor, exchange: Exchange) -> Tensor:
    """rows [n,D] sent to their experts, through them and back: [n,D]."""
    gate_proj, up_proj, down_proj = experts.weights()
    expanding = [up_proj] if gate_proj is None else [gate_proj, up_proj]
    inner = experts.activate(*alltoallv_matmul(rows, expanding, exchange))
    return matmul_alltoallv(inner, down_proj, exchange)


def choose_ep(kind: str, demand: ExchangeDemand, ffn: MoEConfig, train: TrainConfig) -> Chosen:
    """The one of `all_to_all`, `hierarchical` and `fused` that `parallel.ep_kind` means.

    Raises UserError for `fused` where it cannot serve this.
    """
    reason = refuse_exchange(demand) or _refuse_experts(ffn) or _refuse_memory(train)
    if kind == "fused" and reason:
        raise UserError(f"parallel.ep_kind fused: {reason}; use all_to_all")
    if kind != "auto":
        return Chosen(kind)
    if demand.device != "npu":
        return Chosen("all_to_all")
    if reason is None and generation_of(demand.hardware) is None:
        reason = "this NPU is none of those it is documented for"
    return Chosen("all_to_all", f"fused: {reason}") if reason else Chosen("fused")


def _refuse_experts(ffn: MoEConfig) -> str | None:
    if ffn.bias:
        return "its products have no biases (model.ffn.bias)"
    return "it sends every choice (model.ffn.capacity)" if ffn.capacity else None


def _refuse_memory(train: TrainConfig) -> str | None:
    options = {"train.recompute permute": train.recompute, "train.offload expert_output": train.offload}
    return next((f"it keeps its rows to itself ({option})" for option, names in options.items() if option.split()[1] in names), None)
