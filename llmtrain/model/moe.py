"""A mixture of experts in the place of the dense feed-forward branch."""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from llmtrain.config.model import ModelConfig
from llmtrain.model.experts import Experts, LocalDispatcher, Meanwhile, RoutedExperts
from llmtrain.model.ffn import build_dense
from llmtrain.model.router import Choice, Router, Usage, within_capacity


class MoE(nn.Module):
    """Router, routed experts and shared experts: [..,D] -> [..,D].

    `routed` is the seam of `RoutedExperts`: what moves tokens between ranks, or a fused implementation, is put in its place. It is no
    submodule, so the experts' parameters are this module's `experts.*`. With `model.ffn.descend` what goes through the seam is narrower:
    one projection before it and one after it are shared by all experts, while the router sees all of x (BigMac, arXiv 2502.16927).
    """

    def __init__(self, cfg: ModelConfig, *, ops):
        super().__init__()
        ffn = cfg.ffn
        self.count, self.top_k, self.capacity = ffn.experts, ffn.top_k, ffn.capacity
        self.router = Router(cfg)
        width = ffn.descend or cfg.hidden
        self.descend_proj = nn.Linear(cfg.hidden, width, bias=False) if ffn.descend else None
        self.experts = Experts(ffn.experts, width, ffn.hidden, ops=ops, activation=ffn.activation, bias=ffn.bias)
        self.ascend_proj = nn.Linear(width, cfg.hidden, bias=False) if ffn.descend else None
        self.shared = build_dense(ffn, cfg.hidden, width=ffn.shared_hidden, ops=ops) if ffn.shared_experts else None
        self.routed = RoutedExperts(self.experts, LocalDispatcher(ffn.experts, ops, drops=ffn.capacity is not None))
        self.observe: Callable[[Callable[..., Usage]], None] | None = None
        """If set, called in every forward pass with `Router.usage` of it, of which `losses` is left to say."""

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)  # [N,D]
        choice = self.router(rows)
        ids = self._admitted(choice, x)
        if self.observe is not None:
            self.observe(partial(self.router.usage, choice, ids, x.shape[0]))
        sent = rows if self.descend_proj is None else self.descend_proj(rows)
        shared = None if self.shared is None else Meanwhile(partial(self.shared, rows))
        out = self.routed(sent, choice.probs, ids, meanwhile=shared)
        if self.ascend_proj is not None:
            out = self.ascend_proj(out)
        return (out if shared is None else out + shared.result()).view_as(x)

    def _admitted(self, choice: Choice, x: Tensor) -> Tensor:
        """The experts [N,k] of each token that have room for it, their number for none."""
        if self.capacity is None:
            return choice.ids
        return self.admit(choice.probs.detach(), choice.ids, rows=x.shape[0])

    def admit(self, probs: Tensor, ids: Tensor, *, rows: int) -> Tensor:
        """The same for probs and ids [N,k] of `rows` whole sequences; where a rank holds parts of sequences, this is replaced.

        Sequences that are left over, as of the last batch of a validation, have the room of a whole group.
        """
        tokens = self.capacity.sequences * len(ids) // rows
        room = math.ceil(self.capacity.factor * self.top_k * tokens / self.count)
        groups = len(ids) // tokens
        runs = [(slice(groups * tokens), groups), (slice(groups * tokens, None), 1)]
        parts = [within_capacity(probs[run], ids[run], self.count, groups=count, capacity=room) for run, count in runs if len(ids[run])]
        return torch.cat(parts)
