"""The process world and its named mesh. Every group is made eagerly, in one order, by all ranks."""

import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from llmtrain.config.train import ParallelConfig
from llmtrain.device.base import Device
from llmtrain.layout.mesh import AXES, MeshShape


class Mesh:
    """The ranks of a run along their axes, and the few collectives that the loop itself needs."""

    def __init__(self, shape: MeshShape, *, device: Device):
        self.shape = shape
        self.device = device
        self.rank = dist.get_rank()
        self.world = dist.get_world_size()
        self.device_mesh: DeviceMesh = init_device_mesh(device.kind, tuple(getattr(shape, axis) for axis in AXES), mesh_dim_names=AXES)

    @property
    def data_rank(self) -> int:
        """This rank's place among the `shape.dp` ranks that read different samples."""
        replica, shard = (self.device_mesh.get_local_rank(axis) for axis in ("dp_replicate", "dp_shard"))
        return replica * self.shape.dp_shard + shard

    def fsdp_mesh(self) -> DeviceMesh:
        """What FSDP2 shards over: dp_shard, with dp_replicate before it when there are replicas."""
        return self.device_mesh["dp_replicate", "dp_shard"] if self.shape.dp_replicate > 1 else self.device_mesh["dp_shard"]

    def sum(self, *values: float) -> list[float]:
        """Each value summed over all ranks, in float64 where the device has it."""
        dtype = torch.float32 if self.device.unsupported_dtype(torch.float64) else torch.float64
        tensor = torch.tensor(values, dtype=dtype, device=self.device.torch_device)
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor.tolist()

    def gather(self, value: object) -> list:
        """`value` of every rank, in rank order; for rare events."""
        values: list = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def any(self, flag: bool) -> bool:
        """Whether the flag is up on any rank."""
        return self.sum(float(flag))[0] > 0


def start(cfg: ParallelConfig, *, device: Device) -> Mesh:
    """Join the world that the launcher described (RANK, WORLD_SIZE, ...; alone without them) and build the mesh."""
    if not dist.is_initialized():
        timeout = timedelta(seconds=cfg.timeout)
        options = dict(backend=device.collective_backend, timeout=timeout, **device.process_group_options(timeout))
        if "RANK" in os.environ:
            dist.init_process_group(**options)
        else:
            dist.init_process_group(**options, store=dist.HashStore(), rank=0, world_size=1)
    return Mesh(MeshShape.from_config(cfg, world=dist.get_world_size()), device=device)


def stop() -> None:
    """Leave the world."""
    if dist.is_initialized():
        dist.destroy_process_group()
