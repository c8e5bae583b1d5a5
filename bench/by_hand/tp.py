"""Every layer shared by two ranks, and between layers the sequence: Megatron's column and row splits, vocabulary-parallel ends.

Activations are [S,B,D], so that a gather along the sequence needs no copy. Each rank keeps its own positions of a layer's input for the
backward pass and gathers them again, as Megatron does.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from train_peers.shape import Shape

from by_hand.llama import CAUSAL, RMSNorm, rope_table
from by_hand.step import adamw, finish, local, square
from llmtrain.ops.rope import rope_halves
from llmtrain.ops.tiled_attention import attention_tiled

COLUMNS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "embedding", "head")
ROWS = ("out_proj", "down_proj")


def gather(rows: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, dist.Work]:
    """[n,D] of every rank -> [t*n,D]."""
    whole = rows.new_empty(group.size() * rows.shape[0], *rows.shape[1:])
    return whole, dist.all_gather_into_tensor(whole, rows.contiguous(), group=group, async_op=True)


def scatter_sum(rows: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, dist.Work]:
    """[t*n,D] of every rank, summed -> [n,D]."""
    part = rows.new_empty(rows.shape[0] // group.size(), *rows.shape[1:])
    return part, dist.reduce_scatter_tensor(part, rows, group=group, async_op=True)


class Column(torch.autograd.Function):
    """[n,D] of this rank -> [t*n,F] for each weight [F,D]."""

    @staticmethod
    def forward(ctx, group: dist.ProcessGroup, rows: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.group = group
        ctx.save_for_backward(rows, *weights)
        whole, work = gather(rows, group)
        work.wait()
        return tuple(torch.mm(whole, weight.t()) for weight in weights)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor) -> tuple:
        rows, *weights = ctx.saved_tensors
        whole, arriving = gather(rows, ctx.group)
        of_rows = torch.mm(grads[0], weights[0])
        for grad, weight in zip(grads[1:], weights[1:]):
            of_rows.addmm_(grad, weight)
        part, sent = scatter_sum(of_rows, ctx.group)
        arriving.wait()
        of_weights = [torch.mm(grad.t(), whole) for grad in grads]
        sent.wait()
        return None, part, *of_weights


class Row(torch.autograd.Function):
    """[t*n,F] -> [n,D], summed over ranks, for a weight [D,F]."""

    @staticmethod
    def forward(ctx, group: dist.ProcessGroup, rows: Tensor, weight: Tensor) -> Tensor:
        ctx.group = group
        ctx.save_for_backward(rows, weight)
        part, sent = scatter_sum(torch.mm(rows, weight.t()), group)
        sent.wait()
        return part

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple:
        rows, weight = ctx.saved_tensors
        whole, arriving = gather(grad, ctx.group)
        arriving.wait()
        return None, torch.mm(whole, weight), torch.mm(whole.t(), rows)


class ScatterSum(torch.autograd.Function):
    """[S,...] summed over ranks -> [S/t,...]."""

    @staticmethod
    def forward(ctx, group: dist.ProcessGroup, rows: Tensor) -> Tensor:
        ctx.group = group
        part, sent = scatter_sum(rows, group)
        sent.wait()
        return part

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple:
        whole, arriving = gather(grad, ctx.group)
        arriving.wait()
        return None, whole


class VocabularyLoss(torch.autograd.Function):
    """Summed cross-entropy of hidden states [n,D] of each rank over all entries; `targets` [t*n], `weight` [V/t,D] from entry `first`."""

    @staticmethod
    def forward(ctx, group: dist.ProcessGroup, hidden: Tensor, weight: Tensor, targets: Tensor, first: int) -> Tensor:
        rows, arriving = gather(hidden, group)
        arriving.wait()
        logits = torch.mm(rows, weight.t())
        valid, place = targets != -100, targets - first
        own = valid & (place >= 0) & (place < len(weight))
        place = place.masked_fill(~own, 0)[:, None]
        chosen = logits.gather(1, place)[:, 0].masked_fill(~own, 0.0)
        top = logits.amax(1)
        probabilities = torch.softmax(logits, 1, out=logits)
        lse = top - probabilities.amax(1).log()
        both, arriving = gather(torch.stack((lse, chosen)), group)
        arriving.wait()
        both = both.unflatten(0, (-1, 2))  # [t,2,rows]
        whole = both[:, 0].logsumexp(0)
        loss = (whole - both[:, 1].sum(0)).masked_fill(~valid, 0.0).sum()
        probabilities.mul_((lse - whole).exp()[:, None])
        probabilities.scatter_add_(1, place, -own[:, None].to(logits.dtype))
        slope = probabilities.masked_fill_(~valid[:, None], 0.0)
        part, sent = scatter_sum(torch.mm(slope, weight), group)
        ctx.of_weight = torch.mm(slope.t(), rows)
        sent.wait()
        ctx.of_hidden = part
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple:
        return None, ctx.of_hidden.mul_(grad), ctx.of_weight.mul_(grad), None, None


class Attention(nn.Module):
    """Of H/t heads."""

    def __init__(self, shape: Shape, group: dist.ProcessGroup):
        super().__init__()
        self.head, self.group, width = shape.dim // shape.heads, group, shape.dim // group.size()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(shape.dim, width, bias=False) for _ in range(3))
        self.out_proj = nn.Linear(width, shape.dim, bias=False)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """[S/t,B,D] -> [S/t,B,D]."""
        batch = x.shape[1]
        flat = Column.apply(self.group, x.flatten(0, 1), self.q_proj.weight, self.k_proj.weight, self.v_proj.weight)
        q, k, v = (part.view(-1, batch, part.shape[1] // self.head, self.head).permute(1, 2, 0, 3) for part in flat)
        out = attention_tiled(rope_halves(q, *rope), rope_halves(k, *rope), v, mask=CAUSAL)  # [B,H/t,S,d]
        rows = out.permute(2, 0, 1, 3).reshape(-1, self.q_proj.out_features)
        return Row.apply(self.group, rows, self.out_proj.weight).view_as(x)


class FeedForward(nn.Module):
    """Of F/t hidden units."""

    def __init__(self, shape: Shape, group: dist.ProcessGroup):
        super().__init__()
        self.group, width = group, shape.ffn // group.size()
        self.gate_proj, self.up_proj = (nn.Linear(shape.dim, width, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(width, shape.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[S/t,B,D] -> [S/t,B,D]."""
        gate, up = Column.apply(self.group, x.flatten(0, 1), self.gate_proj.weight, self.up_proj.weight)
        return Row.apply(self.group, F.silu(gate) * up, self.down_proj.weight).view_as(x)


class Block(nn.Module):
    """Norms of own positions around shared layers."""

    def __init__(self, shape: Shape, group: dist.ProcessGroup):
        super().__init__()
        self.attention_norm, self.ffn_norm = RMSNorm(shape.dim), RMSNorm(shape.dim)
        self.attention, self.ffn = Attention(shape, group), FeedForward(shape, group)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rope)
        return x + self.ffn(self.ffn_norm(x))


class Embedding(nn.Module):
    """Tokens [S,B] -> [S/t,B,D]."""

    def __init__(self, shape: Shape, group: dist.ProcessGroup):
        super().__init__()
        self.group, entries = group, shape.vocab // group.size()
        self.first = entries * group.rank()
        self.weight = nn.Parameter(torch.empty(entries, shape.dim))

    def forward(self, tokens: Tensor) -> Tensor:
        place = tokens - self.first
        elsewhere = (place < 0) | (place >= len(self.weight))
        found = F.embedding(place.masked_fill(elsewhere, 0), self.weight).masked_fill(elsewhere[..., None], 0.0)
        return ScatterSum.apply(self.group, found)


class Head(nn.Module):
    """Hidden states [S/t,B,D] and targets [S,B] -> summed cross-entropy."""

    def __init__(self, shape: Shape, group: dist.ProcessGroup):
        super().__init__()
        self.group, entries = group, shape.vocab // group.size()
        self.first = entries * group.rank()
        self.weight = nn.Parameter(torch.empty(entries, shape.dim))

    def forward(self, hidden: Tensor, targets: Tensor) -> Tensor:
        return VocabularyLoss.apply(self.group, hidden.flatten(0, 1), self.weight, targets.flatten(), self.first)


class Llama(nn.Module):
    """Tokens and targets [B,S] -> summed cross-entropy, the same on every rank of `group`."""

    def __init__(self, shape: Shape, group: dist.ProcessGroup, weights: dict[str, Tensor]):
        super().__init__()
        self.embedding = Embedding(shape, group)
        self.blocks = nn.ModuleDict({str(i): Block(shape, group) for i in range(shape.layers)})
        self.final_norm, self.head = RMSNorm(shape.dim), Head(shape, group)
        self.width = shape.dim // shape.heads
        self.load_state_dict({name: cut(name, weight, group) for name, weight in weights.items()})

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        rope, x = rope_table(torch.arange(tokens.shape[1]), self.width), self.embedding(tokens.t())
        for block in self.blocks.values():
            x = block(x, rope)
        return self.head(self.final_norm(x), targets.t())


def cut(name: str, weight: Tensor, group: dist.ProcessGroup) -> Tensor:
    """This rank's part of a whole weight."""
    kind = name.split(".")[-2]
    dim = 0 if kind in COLUMNS else 1 if kind in ROWS else None
    return weight if dim is None else weight.chunk(group.size(), dim)[group.rank()].contiguous()


@torch.no_grad()
def sum_norms(model: nn.Module, group: dist.ProcessGroup) -> tuple[list[Tensor], list[Tensor]]:
    """Add up the gradients of the norms, each rank's being of its own positions. Returns gradients of whole and of split parameters."""
    norms = [local(p.grad) for name, p in model.named_parameters() if "norm" in name]
    flat = torch.cat(norms)
    dist.all_reduce(flat, group=group)
    for gradient, total in zip(norms, flat.split([gradient.numel() for gradient in norms])):
        gradient.copy_(total)
    return norms, [p.grad for name, p in model.named_parameters() if "norm" not in name]


class Trainer:
    """tp 2."""

    def __init__(self, shape: Shape, weights: dict[str, Tensor]):
        self.group = dist.group.WORLD
        self.model = Llama(shape, self.group, weights)
        self.optimizer = adamw(self.model)

    def step(self, tokens: Tensor, targets: Tensor) -> float:
        """One step on tokens and targets [B,S]; returns the mean loss."""
        total = (targets != -100).sum().item()
        loss = self.model(tokens, targets)
        (loss / total).backward()
        whole, split = sum_norms(self.model, self.group)
        squares = square(split) + square(whole) / self.group.size()
        return finish(self.optimizer, loss=loss.item() / self.group.size(), squares=squares) / total
