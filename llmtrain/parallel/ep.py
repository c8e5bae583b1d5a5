"""Expert parallelism: every rank of a group holds some experts of each layer, and tokens travel to them and back.

Shapes: N tokens of this rank, k experts of each, E experts, M rows that arrived here, D model width, W width of what is sent.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

from llmtrain.config.model import ModelConfig
from llmtrain.errors import UserError
from llmtrain.model.experts import Dispatched, Experts, Meanwhile, RoutedExperts, sort_rows, unsort_rows
from llmtrain.model.moe import MoE
from llmtrain.ops.experts import inverse
from llmtrain.parallel.ep_fused import FusedExperts
from llmtrain.parallel.fsdp import local_tensor
from llmtrain.parallel.ops.pending import start_gather
from llmtrain.parallel.ops.sequence import gathered_rows, summed_rows


class Arriving(NamedTuple):
    """Rows on their way to the experts."""

    transfer: "Transfer"
    buffer: Tensor
    """[M,W], filled when the transfer has been waited for."""
    received: Tensor
    """[ranks, experts held here] int64: rows from each rank for each expert."""
    order: Tensor
    probs: Tensor


class Return(NamedTuple):
    """How results find back: what `wait` leaves for `combine_start`."""

    arriving: list[int]
    sent: list[int]
    back: Tensor
    """[M]: the rows sorted by expert in the order in which they arrived."""
    order: Tensor
    probs: Tensor


@dataclass
class AllToAllDispatcher:
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

    def start(self, x: Tensor, probs: Tensor, ids: Tensor) -> Arriving:
        # At most [N k,W], sorted by expert and so by rank.
        rows, order, counts = sort_rows(self.ops, x, ids, self.experts, drops=self.drops)
        received = torch.empty_like(counts)
        dist.all_to_all_single(received, counts, group=self.group)
        by_rank = torch.stack((received, counts)).view(2, self.group.size(), -1)
        arriving, sent = by_rank.sum(2).tolist()
        transfer = Transfer(self.group, sent, arriving)
        return Arriving(transfer, transfer.start(rows), by_rank[0], order, probs)

    def wait(self, handle: Arriving) -> Dispatched:
        rows, received = handle.transfer.wait(handle.buffer), handle.received
        held = torch.arange(received.shape[1], device=rows.device).repeat(len(received))
        by_expert = held.repeat_interleave(received.flatten(), output_size=len(rows)).argsort(stable=True)
        back = inverse(by_expert)
        transfer = handle.transfer
        combine = Return(transfer.arriving, transfer.sent, back, handle.order, handle.probs)
        return Dispatched(_Reorder.apply(rows, by_expert, back), received.sum(0), combine)

    def combine_start(self, rows: Tensor, combine: Return) -> tuple["Transfer", Tensor, Return]:
        transfer = Transfer(self.group, combine.arriving, combine.sent)
        return transfer, transfer.start(_Reorder.apply(rows, combine.back, inverse(combine.back))), combine

    def combine_wait(self, handle: tuple["Transfer", Tensor, Return]) -> Tensor:
        transfer, buffer, combine = handle
        return unsort_rows(self.ops, transfer.wait(buffer), combine.order, combine.probs)


@dataclass
class Transfer:
    """One asynchronous all-to-all of rows: `sent[r]` of them to rank r, `arriving[r]` from it. Differentiable; waited for once."""

    group: dist.ProcessGroup
    sent: list[int]
    arriving: list[int]
    _pending: tuple[dist.Work, Tensor, Tensor] | None = field(default=None, init=False)

    def start(self, rows: Tensor) -> Tensor:
        """Send rows [sum of sent, W]; returns the buffer [sum of arriving, W] that fills until `wait`."""
        return _Start.apply(rows, self)

    def wait(self, buffer: Tensor) -> Tensor:
        """The rows that arrived, once they have."""
        return _Wait.apply(buffer, self)

    def launch(self, rows: Tensor, *, backward: bool) -> Tensor:
        """Begin one direction. Keeps hold of what is sent until `finish`."""
        to, of = (self.sent, self.arriving) if backward else (self.arriving, self.sent)
        rows = rows.contiguous()
        buffer = rows.new_empty(sum(to), *rows.shape[1:])
        work = dist.all_to_all_single(buffer, rows, output_split_sizes=to, input_split_sizes=of, group=self.group, async_op=True)
        self._pending = work, rows, buffer
        return buffer

    def finish(self) -> Tensor:
        """Wait for the direction that was begun, and return its buffer."""
        if self._pending is None:
            raise RuntimeError("a dispatch handle was waited for twice, or never started")
        work, _, buffer = self._pending
        work.wait()
        self._pending = None
        return buffer


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, transfer: Transfer) -> Tensor:
        ctx.transfer = transfer
        return transfer.launch(rows, backward=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:
        return ctx.transfer.finish(), None  # begun in the backward of _Wait


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, buffer: Tensor, transfer: Transfer) -> Tensor:
        ctx.transfer = transfer
        transfer.finish()
        return buffer.view_as(buffer)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.transfer.launch(grad, backward=True)
        return grad, None  # of the buffer's shape, as autograd asks; what counts is on its way to _Start's backward


class _Reorder(torch.autograd.Function):
    """rows[order]; the gradient gathers too, where that of indexing would add rows up."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return rows.index_select(0, order)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return grad.index_select(0, inverse), None, None


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


def apply_ep(model: nn.Module, *, expert_mesh: DeviceMesh, tp_group: dist.ProcessGroup | None = None, kind: str = "all_to_all") -> None:
    """Share the experts of every mixture of experts in `model` over the axes `ep` and `etp` of `expert_mesh`, in place.

    Stacks of weights become DTensors: whole experts over `ep` (Shard(0)), each expert's width F over `etp` (gate and up Shard(2), down
    Shard(1)), on meta or filled alike and without communication. With etp 1 every rank sends the tokens that it has, under tp its own
    part of the sequence. Names do not change.

    Args:
        model: anything that contains `MoE` layers; one without is left alone.
        expert_mesh: axes pp, dp_replicate, efsdp, ep, etp (layout.mesh.EXPERT_AXES).
        tp_group: the ranks that etp is laid over, as a group to be used instead of the mesh's own.
        kind: `all_to_all`, or `fused` on npu (llmtrain.parallel.ep_fused).

    Raises:
        UserError: ep does not divide the number of experts, or etp their width.
    """
    for layer in [module for module in model.modules() if isinstance(module, MoE)]:
        _share(layer, expert_mesh, tp_group, fused=kind == "fused")


def check_ep(model: ModelConfig, *, ep: int, etp: int) -> None:
    """Raise UserError, with the arithmetic, unless the experts of this model can be shared so."""
    if model.ffn.kind != "moe":
        raise UserError(f"parallel.ep {ep} and etp {etp} share experts, and model.ffn.kind {model.ffn.kind} has none; set both to 1")
    if etp > 1 and model.ffn.bias:
        raise UserError(f"parallel.etp {etp} splits experts, whose biases (model.ffn.bias) would be added {etp} times; set parallel.etp 1")
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


def _share(layer: MoE, mesh: DeviceMesh, tp_group: dist.ProcessGroup | None, *, fused: bool) -> None:
    experts, (ep, etp) = layer.experts, (mesh.size(mesh.mesh_dim_names.index(axis)) for axis in ("ep", "etp"))
    count, _, width = experts.up_proj.shape
    _check(count, width, ep=ep, etp=etp)
    _shard_weights(experts, mesh, [axis for axis, size in (("ep", ep), ("etp", etp)) if size > 1])
    experts.weights = partial(_local, experts, ("gate_proj", "up_proj", "down_proj"))
    experts.biases = partial(_local, experts, ("gate_bias", "up_bias", "down_bias"))
    if ep > 1:
        group = mesh.get_group("ep")
        if fused:
            layer.routed = FusedExperts(experts, group, count)
        else:
            layer.routed = RoutedExperts(experts, AllToAllDispatcher(group, count, experts.ops, drops=layer.capacity is not None))
    if etp > 1:
        layer.routed = SplitExperts(layer.routed, tp_group or mesh.get_group("etp"))


def _shard_weights(experts: Experts, mesh: DeviceMesh, axes: list[str]) -> None:
    if not axes:
        return
    for name, parameter in list(experts.named_parameters()):
        dims = {"ep": 0, "etp": 1 if name == "down_proj" else 2}
        placements = [Shard(dims[axis]) for axis in axes]
        sharded = distribute_tensor(parameter.detach(), mesh[tuple(axes)], placements, src_data_rank=None)
        experts.register_parameter(name, nn.Parameter(sharded))


def _local(experts: Experts, names: tuple[str, ...]) -> tuple[Tensor | None, ...]:
    """This rank's part of parameters. Read at every call: FSDP2 swaps the parameters."""
    return tuple(local_tensor(getattr(experts, name)) for name in names)
