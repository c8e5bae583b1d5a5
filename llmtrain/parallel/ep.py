"""Expert parallelism: every rank of a group holds some experts of each layer, and tokens travel to them and back.

Shapes: N tokens of this rank, k experts of each, E experts, M rows that arrived here, D model width, W width of what is sent.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from llmtrain.config.model import ModelConfig
from llmtrain.errors import UserError
from llmtrain.model.experts import Experts, Meanwhile, RoutedExperts, sort_rows, unsort_rows
from llmtrain.model.moe import MoE
from llmtrain.parallel.ep_fused import FusedExperts
from llmtrain.parallel.ep_nodes import HierarchicalDispatcher
from llmtrain.parallel.ep_rows import Leaving, Shares, ThroughShares
from llmtrain.parallel.fsdp import local_tensor
from llmtrain.parallel.mesh import NodeGroups
from llmtrain.parallel.ops.pending import start_gather
from llmtrain.parallel.ops.sequence import gathered_rows, summed_rows


class Sent(NamedTuple):
    """Rows on their way to the experts, and how results find back: what `start` leaves for `wait`."""

    shares: Shares
    leaving: Leaving
    order: Tensor
    probs: Tensor


@dataclass
class AllToAllDispatcher(ThroughShares):
    """Experts shared out over the ranks of `group` in equal runs: rank r holds experts r E / ranks to (r + 1) E / ranks - 1.

    `start` sorts the rows by expert, tells the other ranks how many come (one small all-to-all, waited for, as the sizes are needed on
    the host) and sends them asynchronously; `wait` gives them sorted by expert, then by source rank, then by token, so that sums are
    made in one order. The backward pass sends gradients the other way, as asynchronously: between the backwards of `wait` and of `start`
    whatever was computed between the two in the forward pass is differentiated.
    """

    group: dist.ProcessGroup
    experts: int
    ops: Any
    drops: bool = False
    """As in LocalDispatcher."""

    def start(self, x: Tensor, probs: Tensor, ids: Tensor) -> Sent:
        # At most [N k,W], sorted by expert and so by rank.
        rows, order, counts = sort_rows(self.ops, x, ids, self.experts, drops=self.drops)
        shares = Shares.of(counts, self.group)
        return Sent(shares, shares.send(rows), order, probs)

    def combine_wait(self, handle: tuple[Leaving, Sent]) -> Tensor:
        leaving, sent = handle
        return unsort_rows(self.ops, leaving.flight.wait(leaving.buffer), sent.order, sent.probs)


@dataclass
class SplitExperts:
    """Routed experts whose width F is split over `group`, the ranks of tp: all of them compute a part of every token's result.

    Called like RoutedExperts with this rank's tokens: gathers those of the group, and leaves each rank the sums for its own. Routing
    comes before the gathering, so the gradients of a router are partial sums over tp as those of other replicated parameters.
    """

    inner: RoutedExperts
    group: dist.ProcessGroup

    def __call__(self, x: Tensor, probs: Tensor, ids: Tensor, *, meanwhile: Meanwhile | None = None) -> Tensor:
        return summed_rows(self.inner(*self.gather(x, probs, ids), meanwhile=meanwhile), self.group)

    def gather(self, x: Tensor, probs: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Those of all ranks of the group, one rank after the other."""
        return gathered_rows(x, self.group), gathered_rows(probs, self.group), start_gather(ids, self.group).wait()


def apply_ep(
    model: nn.Module,
    *,
    expert_mesh: DeviceMesh,
    tp_group: dist.ProcessGroup | None = None,
    kind: str = "all_to_all",
    nodes: NodeGroups | None = None,
) -> None:
    """Share the experts of every mixture of experts in `model` over the axes `ep` and `etp` of `expert_mesh`, in place.

    Stacks of weights become DTensors: whole experts over `ep` (Shard(0)), each expert's width F over `etp` (gate and up Shard(2), down
    Shard(1)), on meta or filled alike and without communication. With etp 1 every rank sends the tokens that it has, under tp its own
    part of the sequence. Names do not change.

    Args:
        model: anything that contains `MoE` layers; one without is left alone.
        expert_mesh: axes pp, dp_replicate, efsdp, ep, etp (layout.mesh.EXPERT_AXES).
        tp_group: the ranks that etp is laid over, as a group to be used instead of the mesh's own.
        kind: `all_to_all`, `hierarchical` (llmtrain.parallel.ep_nodes), or `fused` on npu (llmtrain.parallel.ep_fused).
        nodes: the groups of hierarchical dispatch, which `ep` is cut in.

    Raises:
        UserError: ep does not divide the number of experts, or etp their width.
    """
    for layer in [module for module in model.modules() if isinstance(module, MoE)]:
        _share(layer, expert_mesh, tp_group, kind=kind, nodes=nodes)


def check_ep(model: ModelConfig, *, ep: int, etp: int) -> None:
    """Raise UserError, with the arithmetic, unless the experts of this model can be shared so in training."""
    check_shares(model, ep=ep, etp=etp)
    if etp > 1 and model.ffn.bias:
        raise UserError(f"parallel.etp {etp} splits experts, whose biases (model.ffn.bias) would be added {etp} times; set parallel.etp 1")


def check_shares(model: ModelConfig, *, ep: int, etp: int) -> None:
    """Raise UserError, with the arithmetic, unless this model has experts whose number and width can be divided so."""
    if model.ffn.kind != "moe":
        raise UserError(f"parallel.ep {ep} and etp {etp} share experts, and model.ffn.kind {model.ffn.kind} has none; set both to 1")
    _check(model.ffn.experts, model.ffn.hidden, ep=ep, etp=etp)


def _check(experts: int, width: int, *, ep: int, etp: int) -> None:
    if experts % ep:
        raise UserError(
            f"parallel.ep {ep} does not divide model.ffn.experts {experts}: {experts} / {ep} = {experts / ep:.2f}; change one of them"
        )
    if width % etp:
        raise UserError(
            f"parallel.etp {etp} does not divide model.ffn.hidden {width}: {width} / {etp} = {width / etp:.2f}; set parallel.etp 1"
        )


def _share(layer: MoE, mesh: DeviceMesh, tp_group: dist.ProcessGroup | None, *, kind: str, nodes: NodeGroups | None) -> None:
    experts, (ep, etp) = layer.experts, (mesh.size(mesh.mesh_dim_names.index(axis)) for axis in ("ep", "etp"))
    count, _, width = experts.up_proj.shape
    _check(count, width, ep=ep, etp=etp)
    _shard_weights(experts, mesh, [axis for axis, size in (("ep", ep), ("etp", etp)) if size > 1])
    experts.weights = partial(_local, experts, ("gate_proj", "up_proj", "down_proj"))
    experts.biases = partial(_local, experts, ("gate_bias", "up_bias", "down_bias"))
    if ep > 1:
        group = mesh.get_group("ep")
        if kind == "fused":
            layer.routed = FusedExperts(experts, group, count)
        elif kind == "hierarchical":
            layer.routed = RoutedExperts(experts, HierarchicalDispatcher(nodes, count))
        else:
            layer.routed = RoutedExperts(experts, AllToAllDispatcher(group, count, experts.ops, drops=layer.capacity is not None))
    if etp > 1:
        layer.routed = SplitExperts(layer.routed, tp_group or mesh.get_group("etp"))


_BY_WIDTH = {"gate_proj": Shard(2), "up_proj": Shard(2), "down_proj": Shard(1)}
_BY_WIDTH |= {"gate_bias": Shard(1), "up_bias": Shard(1), "down_bias": Replicate()}
"""How the stacks of an Experts are split over etp."""


def _shard_weights(experts: Experts, mesh: DeviceMesh, axes: list[str]) -> None:
    if not axes:
        return
    for name, parameter in list(experts.named_parameters()):
        placements = [Shard(0) if axis == "ep" else _BY_WIDTH[name] for axis in axes]
        sharded = distribute_tensor(parameter.detach(), mesh[tuple(axes)], placements, src_data_rank=None)
        experts.register_parameter(name, nn.Parameter(sharded, requires_grad=parameter.requires_grad))


def _local(experts: Experts, names: tuple[str, ...]) -> tuple[Tensor | None, ...]:
    """This rank's part of parameters. Read at every call: FSDP2 swaps the parameters."""
    return tuple(local_tensor(getattr(experts, name)) for name in names)
