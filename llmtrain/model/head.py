"""The output head."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmtrain.config.parameters import loss_rows


class Head(nn.Module):
    """Hidden states to logits, or straight to the loss so that the logits of a sequence never exist whole.

    A module of its own, so that what shards the parameters can gather `weight` [V,D] around its forward.
    """

    def __init__(self, vocab_size: int, hidden: int, *, ops, loss_chunk: int | None):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden))
        self.ops, self.loss_chunk = ops, loss_rows(vocab_size, loss_chunk)

    def forward(self, hidden: Tensor, targets: Tensor | None = None) -> Tensor:
        """hidden [B,S,D] -> logits [B,S,V]; with targets [B,S] (-100 is none) the summed cross-entropy, a scalar."""
        if targets is None:
            return F.linear(hidden, self.weight.to(hidden.dtype))
        return self.ops.cross_entropy(hidden.flatten(0, -2), self.weight, targets.flatten(), chunk=self.loss_chunk)
