"""Which experts a token goes to."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmtrain.config.model import ModelConfig


class Choice(NamedTuple):
    """What a router says of N tokens."""

    probs: Tensor
    """[N,k]: what the results of the chosen experts are multiplied by."""
    ids: Tensor
    """[N,k] int64, the highest score first."""
    logits: Tensor
    """[N,E], in fp32 or higher."""
    scores: Tensor
    """[N,E]: the scores without bias."""


class Usage(NamedTuple):
    """How the tokens of B rows used a layer's experts."""

    counts: Tensor
    """[B,E] int64: choices of each expert, dropped ones included."""
    dropped: Tensor
    """Choices that found no room."""
    scores: Tensor | None = None
    """[B,E]: sums over a row's tokens of their scores, each token's normalised to 1; has a gradient."""
    squares: Tensor | None = None
    """Sum over tokens of the squared log-sum-exp of their logits; has a gradient."""


class Router(nn.Module):
    """x [N,D] -> Choice: scores of all experts, the k highest of them, renormalised and scaled as `model.ffn.router` says.

    Softmax scores are Mixtral's (arXiv 2401.04088), sigmoid scores, groups, scale and bias DeepSeek-V3's (arXiv 2412.19437). Computed in
    fp32 or higher whatever x has. Of equal scores the one with the lowest id comes first, on every device. `bias` [E] has no gradient:
    what trains the model moves it (`model.ffn.router.bias_rate`).
    """

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(cfg.ffn.experts, cfg.hidden))
        self.options, self.top_k = cfg.ffn.router, cfg.ffn.top_k
        biased = self.options.bias_rate is not None
        self.register_buffer("bias", torch.empty(cfg.ffn.experts, dtype=torch.float32) if biased else None)

    def _apply(self, fn, recurse=True):
        # In 16 bits the bias would be rounded, and choose other experts; its steps would be lost.
        bias = self.bias
        super()._apply(fn, recurse)
        if bias is not None and self.bias.dtype.itemsize < 4:
            self.bias = bias.to(self.bias.device)
        return self

    def forward(self, x: Tensor) -> Choice:
        options, precise = self.options, torch.promote_types(x.dtype, torch.float32)
        logits = F.linear(x.to(precise), self.weight.to(precise))  # [N,E]
        scores = logits.softmax(-1) if options.score == "softmax" else logits.sigmoid()
        ids = self._dealt(scores) if options.force_balance else self._chosen(scores.detach())
        probs = scores.gather(-1, ids)
        if options.renormalise:
            probs = probs / (probs.sum(-1, keepdim=True) + 1e-20)  # sigmoids may all be 0
        return Choice(probs if options.scale == 1.0 else probs * options.scale, ids, logits, scores)

    def _chosen(self, scores: Tensor) -> Tensor:
        if self.bias is not None:
            scores = scores + self.bias
        groups = self.options.groups
        if self.options.top_groups < groups:
            members = scores.unflatten(-1, (groups, -1))  # [N,G,E/G]
            best = members.topk(min(2, members.shape[-1]), dim=-1).values.sum(-1)
            allowed = torch.zeros_like(best, dtype=torch.bool).scatter_(-1, highest(best, self.options.top_groups), True)
            scores = members.masked_fill(~allowed.unsqueeze(-1), float("-inf")).flatten(-2)
        return highest(scores, self.top_k)

    def _dealt(self, scores: Tensor) -> Tensor:
        """Experts in turn, [N,k]."""
        tokens, experts = scores.shape
        return torch.arange(tokens * self.top_k, device=scores.device).view(tokens, self.top_k) % experts

    def usage(self, choice: Choice, ids: Tensor, rows: int, *, losses: bool) -> Usage:
        """`choice` summed up over the tokens of each of `rows` rows; `ids` [N,k] are those that were sent, the number of experts for none.
        `losses` asks for what has a gradient too."""
        experts, wanted = choice.scores.shape[-1], choice.ids.reshape(rows, -1)
        counts = torch.zeros(rows, experts, dtype=torch.int64, device=ids.device).scatter_add_(1, wanted, torch.ones_like(wanted))
        dropped = (ids == experts).sum()
        if not losses:
            return Usage(counts, dropped)
        shares = choice.scores if self.options.score == "softmax" else choice.scores / choice.scores.sum(-1, keepdim=True)
        squares = choice.logits.logsumexp(-1).square().sum()
        return Usage(counts, dropped, shares.view(rows, -1, experts).sum(1), squares)


def highest(scores: Tensor, k: int) -> Tensor:
    """Columns of the k highest scores of each row, [N,E] in fp32 or fp64 -> [N,k] int64, highest first, of equal ones the first column.

    topk leaves open which of equal ones it takes. In fp32 it gets whole numbers that put the column behind the score (four to five times
    faster than sorting all of them).
    """
    if scores.dtype != torch.float32:
        return scores.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    bits = (scores + 0.0).view(torch.int32).to(torch.int64)  # + 0.0 makes -0 a 0
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # negative floats run backwards
    columns = torch.arange(scores.shape[-1] - 1, -1, -1, device=scores.device)
    return (ordered * 2**32 + columns).topk(k, dim=-1).indices


def within_capacity(probs: Tensor, ids: Tensor, experts: int, *, groups: int, capacity: int) -> Tensor:
    """`ids` [N,k] with `experts` in the place of choices that find no room: of each of `groups` equal runs of tokens an expert takes the
    `capacity` choices with the highest `probs` [N,k], of equal ones the first.

    Equal is what agrees in 15 binary digits: tokens that are alike, as documents' first ones often are, differ by rounding alone, which is
    not the same on every mesh.
    """
    flat = ids.flatten()
    group = torch.arange(len(flat), device=ids.device) // (len(flat) // groups)
    place = group * experts + flat  # which expert's room for which group
    digits = (
        probs.detach().flatten().to(torch.float32).view(torch.int32) + 256
    ) >> 9  # in the order of the numbers, which are not negative
    order = digits.argsort(descending=True, stable=True)
    order = order[place[order].argsort(stable=True)]
    sizes = torch.bincount(place, minlength=groups * experts)
    first = sizes.cumsum(0) - sizes
    standing = torch.arange(len(flat), device=ids.device) - first[place[order]]
    over = torch.empty_like(standing).scatter_(0, order, standing) >= capacity
    return flat.masked_fill(over, experts).view_as(ids)
