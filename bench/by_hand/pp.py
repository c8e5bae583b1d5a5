"""Two pipeline stages of half the blocks each, 1F1B over micro-batches of one row."""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from train_peers.shape import Shape

from by_hand.llama import Block, Head, RMSNorm, rope_table
from by_hand.step import adamw, finish, square


class Stage(nn.Module):
    """Embedding and the first half of the blocks, or the second half and the loss."""

    def __init__(self, shape: Shape, rank: int):
        super().__init__()
        half = shape.layers // 2
        self.embedding = nn.Embedding(shape.vocab, shape.dim) if rank == 0 else None
        self.blocks = nn.ModuleDict({str(i): Block(shape) for i in (range(half) if rank == 0 else range(half, shape.layers))})
        self.final_norm, self.head = (RMSNorm(shape.dim), Head(shape)) if rank else (None, None)

    def forward(self, x: Tensor, targets: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        if self.embedding is not None:
            x = self.embedding(x)
        for block in self.blocks.values():
            x = block(x, rope)
        return x if self.head is None else self.head(self.final_norm(x), targets)


class Trainer:
    """pp 2."""

    def __init__(self, shape: Shape, weights: dict[str, Tensor]):
        self.rank, self.shape = dist.get_rank(), shape
        self.stage = Stage(shape, self.rank)
        own = self.stage.state_dict()
        self.stage.load_state_dict({name: weights[name] for name in own})
        self.optimizer = adamw(self.stage)

    def step(self, tokens: Tensor, targets: Tensor) -> float:
        """One step on tokens and targets [B,S], a row at a time; returns the mean loss."""
        total = (targets != -100).sum().item()
        rope = rope_table(torch.arange(self.shape.seq), self.shape.dim // self.shape.heads)
        rows = list(zip(tokens.split(1), targets.split(1)))
        losses = self._first(rows, rope) if self.rank == 0 else self._second(rows, rope, total)
        squares = square([p.grad for p in self.stage.parameters()])
        return finish(self.optimizer, loss=sum(losses), squares=squares) / total

    def _room(self) -> Tensor:
        return torch.empty(1, self.shape.seq, self.shape.dim)

    def _first(self, rows: list, rope: tuple) -> list[float]:
        """F0, then one forward and one backward in turn. Sent tensors are held until they have arrived."""
        sent, left = [], []

        def forward(index: int) -> None:
            left.append(self.stage(*rows[index], rope))
            sent.append((left[-1], dist.isend(left[-1].detach(), 1)))

        forward(0)
        for index in range(len(rows)):
            if index + 1 < len(rows):
                forward(index + 1)
            grad = self._room()
            dist.irecv(grad, 1).wait()
            left[index].backward(grad)
            left[index] = None
        for _, work in sent:
            work.wait()
        return []

    def _second(self, rows: list, rope: tuple, total: int) -> list[float]:
        sent, losses = [], []
        entered = self._room()
        arriving = dist.irecv(entered, 0)
        for index, (_, targets) in enumerate(rows):
            arriving.wait()
            here = entered.requires_grad_()
            loss = self.stage(here, targets, rope)
            (loss / total).backward()
            losses.append(loss.detach())
            sent.append((here.grad, dist.isend(here.grad, 0)))
            if index + 1 < len(rows):
                entered = self._room()
                arriving = dist.irecv(entered, 0)
        for _, work in sent:
            work.wait()
        return torch.stack(losses).tolist()
