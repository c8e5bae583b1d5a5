"""Experts over several ranks for generation and evaluation.

Every rank has all tokens, so none have to travel: each rank computes those of its own experts, and the results are added up. Per layer that
is one all-reduce of [N,D], where all-to-alls would carry N k rows of D numbers there, of which the receiver has all, and back.
"""

from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from llmtrain.errors import UserError
from llmtrain.model.experts import LocalDispatcher, Meanwhile, RoutedExperts
from llmtrain.model.moe import MoE
from llmtrain.parallel.ep import apply_ep
from llmtrain.parallel.hang.where import recorded


def share_experts(model: nn.Module, mesh: DeviceMesh) -> None:
    """Share the experts of `model`, on meta, over the axes ep and etp of `mesh` (layout.mesh.EXPERT_AXES), one of which is 1, in place.

    Raises UserError if ep does not divide the number of experts, or etp their width.
    """
    ep, etp = (mesh.size(mesh.mesh_dim_names.index(axis)) for axis in ("ep", "etp"))
    if ep > 1 and etp > 1:
        raise UserError(f"parallel.ep {ep} and etp {etp}: a model that answers is shared over one of them; set etp 1")
    apply_ep(model, expert_mesh=mesh)
    group = mesh.get_group("ep" if ep > 1 else "etp")
    for layer in (module for module in model.modules() if isinstance(module, MoE)):
        layer.routed = OwnExperts(layer, group, whole=ep > 1)


class OwnExperts:
    """Called like RoutedExperts by all ranks of `group`, with the same tokens: the sum of what each computes with what it holds.

    `whole`: the ranks hold different experts, rank r of R those from r E / R on; otherwise a part of the width of each.
    """

    def __init__(self, layer: MoE, group: dist.ProcessGroup, *, whole: bool):
        experts, self.group, self.whole = layer.experts, group, whole
        self.count = layer.count // group.size() if whole else layer.count
        self.routed = RoutedExperts(experts, LocalDispatcher(self.count, experts.ops, drops=whole or layer.capacity is not None))
        if not whole and group.rank():
            experts.biases = partial(_without_last, experts.biases)

    def __call__(self, x: Tensor, probs: Tensor, ids: Tensor, *, meanwhile: Meanwhile | None = None) -> Tensor:
        if self.whole:
            here = ids - self.group.rank() * self.count
            ids = torch.where((here >= 0) & (here < self.count), here, self.count)
        out = self.routed(x, probs, ids, meanwhile=meanwhile)
        with recorded("all_reduce", self.group):
            dist.all_reduce(out, group=self.group)
        return out


def _without_last(biases) -> tuple[Tensor | None, ...]:
    """What is added to the results is to be added by one rank alone."""
    return *biases()[:-1], None
