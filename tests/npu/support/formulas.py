"""What each wrapper has to compute, in float64, written from the definition. Shares no code with wrappers or stand-in."""

import math

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    size = x.shape[-1]
    return x * weight / torch.sqrt(torch.einsum("...d,...d->...", x, x)[..., None] / size + eps)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    columns = []
    for i in range(2 * half):
        partner, sign = (i + half, -1) if i < half else (i - half, 1)
        columns.append(x[..., i] * cos[..., i] + sign * x[..., partner] * sin[..., i])
    return torch.stack(columns, -1)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return gate * up / (1 + torch.exp(-gate))


def cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    total = hidden.new_zeros(())
    for row, target in zip(hidden, targets.tolist()):
        if target != -100:
            logits = weight @ row
            total = total + torch.log(torch.exp(logits).sum()) - logits[target]
    return total


def grouped_mm(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    experts = [e for e, count in enumerate(counts.tolist()) for _ in range(count)]
    return torch.stack([torch.einsum("d,df->f", row, weight[e]) for row, e in zip(x, experts)])


def permute(x: Tensor, ids: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    copies = [(expert, token, slot) for token, row in enumerate(ids.tolist()) for slot, expert in enumerate(row)]
    copies.sort()
    k = ids.shape[1]
    counts = [sum(e == expert for e, _, _ in copies) for expert in range(experts)]
    rows = torch.stack([x[token] for _, token, _ in copies])
    return rows, torch.tensor([token * k + slot for _, token, slot in copies]), torch.tensor(counts)


def unpermute(rows: Tensor, order: Tensor, probs: Tensor) -> Tensor:
    k = probs.shape[1]
    out = [0 * rows[0] for _ in probs]
    for row, copy in zip(rows, order.tolist()):
        out[copy // k] = out[copy // k] + probs[copy // k, copy % k] * row
    return torch.stack(out)


def attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float, sees) -> tuple[Tensor, Tensor]:
    """out [B,H,S,dv] and log-sum-exp [B,H,S]; `sees(row, i, j)` says whether query i of a batch row sees key j."""
    group = q.shape[1] // k.shape[1]
    outs, sums = [], []
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for i in range(q.shape[2]):
                keys = [j for j in range(k.shape[2]) if sees(b, i, j)]
                weights = torch.exp(scale * (k[b, h // group, keys] @ q[b, h, i]))
                sums.append(torch.log(weights.sum()))
                outs.append(weights @ v[b, h // group, keys] / weights.sum())
    return torch.stack(outs).view(*q.shape[:3], v.shape[-1]), torch.stack(sums).view(q.shape[:3])


def gating(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of exp(x) / sum exp(x), and their columns."""
    shares = torch.exp(logits) / torch.exp(logits).sum(1, keepdim=True)
    ids = [sorted(range(logits.shape[1]), key=lambda e: -row[e])[:k] for row in shares.tolist()]
    return torch.stack([shares[n, columns] for n, columns in enumerate(ids)]), torch.tensor(ids)


def adamw(weight: Tensor, grads: list[Tensor], *, lr: float, betas: tuple[float, float], eps: float, decay: float) -> Tensor:
    """The weight after one step per gradient (arXiv 1711.05101, algorithm 2)."""
    first = second = torch.zeros_like(weight)
    for t, grad in enumerate(grads, 1):
        first = betas[0] * first + (1 - betas[0]) * grad
        second = betas[1] * second + (1 - betas[1]) * grad * grad
        step = first / (1 - betas[0] ** t) / (torch.sqrt(second / (1 - betas[1] ** t)) + eps)
        weight = weight - lr * (step + decay * weight)
    return weight


def default_scale(q: Tensor) -> float:
    return 1 / math.sqrt(q.shape[-1])
