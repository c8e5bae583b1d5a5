"""Ranks that share every sequence: rank r of n holds pieces r and 2n-1-r of 2n; keys and values are gathered. FSDP2 over the same ranks."""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import init_device_mesh
from train_peers.shape import Shape

from by_hand.dp import shard
from by_hand.llama import CAUSAL, Attention, Llama
from by_hand.step import adamw, finish, square
from llmtrain.ops.tiled_attention import attention_tiled


class Gather(torch.autograd.Function):
    """[L,...] of every rank -> [n*L,...]; backward, the gradients are summed and scattered."""

    @staticmethod
    def forward(ctx, local: Tensor) -> Tensor:
        whole = local.new_empty(dist.get_world_size() * local.shape[0], *local.shape[1:])
        dist.all_gather_into_tensor(whole, local)
        return whole

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:
        local = grad.new_empty(grad.shape[0] // dist.get_world_size(), *grad.shape[1:])
        dist.reduce_scatter_tensor(local, grad.contiguous())
        return local


def pieces(length: int) -> tuple[range, range]:
    """The positions of this rank."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    size = length // (2 * ranks)
    return tuple(range(size * i, size * (i + 1)) for i in (rank, 2 * ranks - 1 - rank))


class SharedAttention(Attention):
    """Attention over the keys of all ranks."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[B,H,L,d] each -> [B,H,L,d]."""
        ranks = dist.get_world_size()
        joined = Gather.apply(torch.cat((k, v), -1).permute(2, 0, 1, 3).contiguous())  # [n*L,B,H,2d]
        halves = joined.chunk(2 * ranks)  # rank 0's two pieces, rank 1's two, ...
        order = [*halves[::2], *halves[1::2][::-1]]
        keys, values = torch.cat(order).permute(1, 2, 0, 3).chunk(2, -1)  # [B,H,S,d]
        here, outs = pieces(keys.shape[2]), []
        for piece, query in zip(here, q.chunk(2, 2)):
            seen = slice(0, piece.stop)
            outs.append(attention_tiled(query, keys[:, :, seen], values[:, :, seen], mask=CAUSAL, q_offset=piece.start))
        return torch.cat(outs, 2)


class Trainer:
    """cp 2."""

    def __init__(self, shape: Shape, weights: dict[str, Tensor]):
        self.model = Llama(shape, SharedAttention)
        self.model.load_state_dict(weights)
        shard(self.model, init_device_mesh("cpu", (dist.get_world_size(),)))
        self.optimizer = adamw(self.model)
        self.positions = torch.tensor([p for piece in pieces(shape.seq) for p in piece])

    def step(self, tokens: Tensor, targets: Tensor) -> float:
        """One step on tokens and targets [B,S], of which this rank takes its positions; returns the mean loss."""
        total = (targets != -100).sum().item()
        loss = self.model(tokens[:, self.positions], targets[:, self.positions], self.positions)
        (loss / total).backward()
        squares = square([p.grad for p in self.model.parameters()])
        return finish(self.optimizer, loss=loss.item(), squares=squares) / total
