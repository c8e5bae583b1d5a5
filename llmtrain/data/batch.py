"""What the model is fed."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

NO_TARGET = -100
"""Value of `targets` where there is nothing to predict."""


@dataclass(frozen=True)
class Batch:
    """A few samples of one sequence length. Shapes: B samples, S tokens each; all tensors are [B, S] int64.

    `documents` holds per sample the lengths of the documents in it, which sum to S (as in `Mask`); None means that all tokens of
    a sample see each other. `samples` are the global sample indices, for messages and for telling what was read.
    """

    tokens: Tensor
    """Token ids."""
    targets: Tensor
    """The next token of the same document, -100 where there is none."""
    positions: Tensor
    """Place of each token, from 0 in each document (in each sample where `documents` is None)."""
    documents: tuple[tuple[int, ...], ...] | None
    """Document lengths per sample."""
    samples: tuple[int, ...]
    """Global sample index per row."""

    @property
    def target_count(self) -> int:
        """Number of tokens that count in the loss."""
        return int((self.targets != NO_TARGET).sum())

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on a torch device; copies from pinned memory do not block."""
        move = {name: getattr(self, name).to(device, non_blocking=True) for name in ("tokens", "targets", "positions")}
        return replace(self, **move)
