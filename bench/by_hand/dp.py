"""Parameters sharded over ranks that read different rows: FSDP2 around every block."""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from train_peers.shape import Shape

from by_hand.llama import Llama
from by_hand.step import adamw, finish, square


def shard(model: nn.Module, mesh: DeviceMesh) -> None:
    """Gradients are summed. What is needed again at once stays gathered; the embedding's gradient does not need its table."""
    *blocks, last = model.blocks.values()
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(last, mesh=mesh, reshard_after_forward=False)
    fully_shard(model.embedding, mesh=mesh).set_unshard_in_backward(False)
    fully_shard([model.final_norm, model.head], mesh=mesh, reshard_after_forward=False)
    fully_shard(model, mesh=mesh)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


class Trainer:
    """dp_shard 2."""

    def __init__(self, shape: Shape, weights: dict[str, Tensor]):
        self.model = Llama(shape)
        self.model.load_state_dict(weights)
        shard(self.model, init_device_mesh("cpu", (dist.get_world_size(),)))
        self.optimizer = adamw(self.model)
        self.positions = torch.arange(shape.seq)

    def step(self, tokens: Tensor, targets: Tensor) -> float:
        """One step on tokens and targets [B,S], of which this rank takes its rows; returns the mean loss."""
        tokens, targets = (x.chunk(dist.get_world_size())[dist.get_rank()] for x in (tokens, targets))
        count = (targets != -100).sum()
        dist.all_reduce(count)
        total = count.item()
        loss = self.model(tokens, targets, self.positions)
        (loss / total).backward()
        squares = square([p.grad for p in self.model.parameters()])
        return finish(self.optimizer, loss=loss.item(), squares=squares) / total
