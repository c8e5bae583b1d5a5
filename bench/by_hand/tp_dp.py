"""Layers shared by pairs of ranks (`by_hand.tp`), parameters sharded and rows parted between the pairs by FSDP2 (`by_hand.dp`)."""

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from train_peers.shape import Shape

from by_hand.dp import shard
from by_hand.step import adamw, finish, square
from by_hand.tp import Llama, sum_norms


class Trainer:
    """dp_shard 2 x tp 2."""

    def __init__(self, shape: Shape, weights: dict[str, Tensor]):
        self.mesh = init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("dp", "tp"))
        self.tp, self.dp = self.mesh.get_group("tp"), self.mesh.get_group("dp")
        self.model = Llama(shape, self.tp, weights)
        shard(self.model, self.mesh["dp"])
        self.optimizer = adamw(self.model)

    def step(self, tokens: Tensor, targets: Tensor) -> float:
        """One step on tokens and targets [B,S], of which this pair takes its rows; returns the mean loss."""
        tokens, targets = (x.chunk(self.dp.size())[self.dp.rank()] for x in (tokens, targets))
        count = (targets != -100).sum()
        dist.all_reduce(count, group=self.dp)
        total = count.item()
        loss = self.model(tokens, targets)
        (loss / total).backward()
        whole, split = sum_norms(self.model, self.tp)
        squares = square(split) + square(whole) / self.tp.size()
        return finish(self.optimizer, loss=loss.item() / self.tp.size(), squares=squares) / total
