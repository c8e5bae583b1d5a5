"""The process world and its named mesh. Every group is made eagerly, in one order, by all ranks."""

import atexit
import gc
import itertools
import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import cache, cached_property, partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from llmtrain.compat import clear_dtensor_caches, concatenate_meshes, flatten_mesh, take_groups
from llmtrain.config.train import ParallelConfig
from llmtrain.device.base import Device
from llmtrain.layout.mesh import AXES, EXPERT_AXES, FLAT, MeshShape
from llmtrain.parallel.hang.where import device_wait, recorded

MARGIN = 30.0  # seconds after parallel.timeout at which the back end itself gives up, should the watcher (`parallel/hang/watch.py`) fail


class NodeGroups(NamedTuple):
    """This rank's groups of hierarchical dispatch."""

    outer: dist.ProcessGroup
    """The ranks at the same place in other nodes."""
    inner: dist.ProcessGroup
    """The ranks of this node."""


def node_groups(shape: MeshShape, options: Callable[[], Any | None] = lambda: None) -> NodeGroups:
    """Make the groups of ep_outer and ep_inner of `shape`, all of them on every rank; returns this rank's. `options` as in Mesh."""
    mine = {}
    for axis in NodeGroups._fields:
        for group in shape.groups(f"ep_{axis}"):
            alone = len(group.ranks) == 1 or dist.get_rank() not in group.ranks
            own = None if alone else options()
            given = {} if own is None else {"pg_options": own, "timeout": own._timeout}
            everyone = len(group.ranks) == shape.world
            made = dist.group.WORLD if everyone else dist.new_group(list(group.ranks), group_desc=f"mesh_{group.axis}", **given)
            if dist.get_rank() in group.ranks:
                mine[axis] = made
    return NodeGroups(**mine)


class Mesh:
    """The ranks of a run along their axes, and the few collectives that the loop itself needs.

    `options()` gives those of one group, or None for the back end's own. The world, which also serves an axis of all ranks, has its own.
    """

    def __init__(self, shape: MeshShape, *, device: Device, options: Callable[[], Any | None] = lambda: None):
        self.shape = shape
        self.device = device
        self.rank = dist.get_rank()
        self.world = dist.get_world_size()
        self._options = options
        # The order of these calls is that of MeshShape.all_groups.
        self.device_mesh: DeviceMesh = self._make(AXES)
        self.fsdp: DeviceMesh = flatten_mesh(self.device_mesh[FLAT["fsdp"]], "fsdp", self._options_of("fsdp"))
        self.experts: DeviceMesh | None = None
        """The axes of EXPERT_AXES; None where experts are shared as all other parameters are."""
        if shape.ep > 1 or shape.etp > 1:
            self.experts = self._make(EXPERT_AXES)
        self.nodes = None if shape.ep_inner is None else node_groups(shape, options)
        """What hierarchical dispatch sends over; None without it."""

    def _make(self, axes: Sequence[str]) -> DeviceMesh:
        options = {axis: self._options_of(axis) for axis in axes}
        given = {axis: option for axis, option in options.items() if option is not None}
        return init_device_mesh(self.device.kind, self.shape.sizes(axes), mesh_dim_names=axes, backend_override=given or None)

    def _options_of(self, axis: str) -> Any | None:
        """For the groups of `axis`, of which each rank is in one. Alone a rank sends nothing; for all ranks there is the world."""
        return self._options() if 1 < getattr(self.shape, axis) < self.world else None

    def place(self, axis: str) -> int:
        """Where this rank stands along `axis`."""
        return self.device_mesh.get_local_rank(axis)

    def group(self, axis: str) -> dist.ProcessGroup:
        """The ranks that differ from this one along `axis` alone."""
        return self.device_mesh.get_group(axis)

    def expert_group(self, axis: str) -> dist.ProcessGroup:
        """The same for an axis of `shape.expert_axes`, where `experts` is not None."""
        return getattr(self.nodes, axis.removeprefix("ep_")) if axis in ("ep_outer", "ep_inner") else self.experts.get_group(axis)

    @property
    def data_rank(self) -> int:
        """This rank's place among the `shape.dp` ranks that read different samples."""
        return self.place("dp_replicate") * self.shape.dp_shard + self.place("dp_shard")

    @cached_property
    def dense(self) -> DeviceMesh:
        """The ranks that share the dense parameters of a pipeline stage: dp_replicate x fsdp x tp."""
        return concatenate_meshes(self.device_mesh["dp_replicate"], self.fsdp, self.device_mesh["tp"])

    @cached_property
    def experts_of_a_stage(self) -> DeviceMesh:
        """The ranks that share the experts of a pipeline stage."""
        return self.experts["dp_replicate", "efsdp", "ep", "etp"]

    def fsdp_mesh(self) -> DeviceMesh:
        """What FSDP2 shards over: dp_shard x cp, with dp_replicate before it when there are replicas."""
        return concatenate_meshes(self.device_mesh["dp_replicate"], self.fsdp) if self.shape.dp_replicate > 1 else self.fsdp

    def expert_fsdp_mesh(self) -> DeviceMesh:
        """What FSDP2 shards experts over."""
        return self.experts["dp_replicate", "efsdp"] if self.shape.dp_replicate > 1 else self.experts["efsdp"]

    def sum(self, *values: float, axes: Sequence[str] | None = None) -> list[float]:
        """Each value summed over all ranks, or over those that differ from this one along `axes`; in float64 where the device has it."""
        dtype = torch.float32 if self.device.unsupported_dtype(torch.float64) else torch.float64
        tensor = torch.tensor(values, dtype=dtype, device=self.device.torch_device)
        for group in [dist.group.WORLD] if axes is None else map(self.group, axes):
            if group.size() > 1:
                with recorded("all_reduce", "world" if axes is None else group):
                    dist.all_reduce(tensor, group=group)
        with device_wait():
            return tensor.tolist()

    def gather(self, value: object) -> list:
        """`value` of every rank, in rank order; for rare events."""
        values: list = [None] * self.world
        with recorded("all_gather_object", "world"):
            dist.all_gather_object(values, value)
        return values

    def meet(self) -> None:
        """Wait for all ranks: at the end of the work, since a back end's threads may not outlive what they still carry."""
        if self.world > 1:
            with recorded("barrier", "world"):
                dist.barrier()

    def take_groups(self) -> set[dist.ProcessGroup]:
        """The groups that this mesh holds, which then end with whatever else holds them; it is of no use any more."""
        nodes, self.nodes = self.nodes or (), None
        return take_groups(*filter(None, [self.device_mesh, self.experts])) | set(nodes)

    def leave(self) -> None:
        """End the groups of this mesh, but not the world, in which another mesh may follow: gloo has a few threads for each group."""
        groups = self.take_groups() - {dist.group.WORLD}
        if groups:
            clear_dtensor_caches()
        for group in groups:
            dist.destroy_process_group(group)
        gc.collect()

    def any(self, flag: bool) -> bool:
        """Whether the flag is up on any rank."""
        return self.sum(float(flag))[0] > 0


_STARTS = itertools.count()


@cache
def _meeting_place(timeout: timedelta) -> tuple[dist.Store, int, int]:
    """The store of all ranks, this rank, and how many there are. One store for the life of the process: a job that starts a world again,
    such as one of several rounds, would find that of the world before, which ends when its first rank lets go of it."""
    return next(dist.rendezvous("env://", timeout=timeout))


def start(cfg: ParallelConfig, *, device: Device) -> Mesh:
    """Join the world that the launcher described (RANK, WORLD_SIZE, ...; alone without them) and build the mesh."""
    timeout = timedelta(seconds=cfg.timeout + MARGIN)
    if not dist.is_initialized():
        named = device.process_group_options(timeout, buffer_mb=cfg.hccl_buffer_mb)
        options = dict(backend=device.collective_backend, timeout=timeout, **named)
        if "RANK" in os.environ:
            store, rank, size = _meeting_place(timeout)
            dist.init_process_group(**options, store=dist.PrefixStore(f"start {next(_STARTS)}", store), rank=rank, world_size=size)
        else:
            dist.init_process_group(**options, store=dist.HashStore(), rank=0, world_size=1)
        atexit.register(gc.collect)  # of the groups: a thread of gloo that lets go of its last tensor while Python ends kills the process
    options = partial(device.group_options, timeout, buffer_mb=cfg.hccl_buffer_mb)
    local = int(os.environ["LOCAL_WORLD_SIZE"]) if "LOCAL_WORLD_SIZE" in os.environ else None
    shape = MeshShape.from_config(cfg, world=dist.get_world_size(), local=local)
    return Mesh(shape, device=device, options=options)


def stop(mesh: Mesh) -> None:
    """Leave the world. Its groups, and threads of gloo, end with the last object that holds them, at the latest when the process ends."""
    if dist.is_initialized():
        dist.destroy_process_group()
    mesh.take_groups()
