"""What every contender is given: one Llama shape, one stream of batches, one optimizer. Shapes: B samples, T tokens each."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

LR, BETAS, EPS, WEIGHT_DECAY, CLIP = 3e-4, (0.9, 0.95), 1e-8, 0.1, 1.0
BATCHES = 8


@dataclass(frozen=True)
class Shape:
    """An untied Llama: multi-head attention, SwiGLU, RMSNorm, RoPE; and the batch that it trains on."""

    vocab: int = 8192
    dim: int = 384
    layers: int = 6
    heads: int = 6
    ffn: int = 1024
    seq: int = 512
    batch: int = 8

    @property
    def tokens(self) -> int:
        """Tokens of one step."""
        return self.batch * self.seq

    @property
    def parameters(self) -> int:
        """Parameters; every contender must have exactly these."""
        block = 4 * self.dim**2 + 3 * self.dim * self.ffn + 2 * self.dim
        return 2 * self.vocab * self.dim + self.layers * block + self.dim

    @property
    def flops(self) -> int:
        """FLOPs of one step: 6 per token and parameter but the input embedding, and 12 L T D per token for full attention."""
        per_token = 6 * (self.parameters - self.vocab * self.dim) + 12 * self.layers * self.seq * self.dim
        return per_token * self.tokens

    @property
    def state_bytes(self) -> int:
        """fp32 parameters, gradients and both moments."""
        return 16 * self.parameters


def batches(shape: Shape) -> list[tuple[Tensor, Tensor]]:
    """The (tokens, targets) [B,T] that are trained on in turn; half of the tokens follow from the one before."""
    generator = torch.Generator().manual_seed(7)
    made = []
    for _ in range(BATCHES):
        ids = torch.randint(0, shape.vocab, (shape.batch, shape.seq + 1), generator=generator)
        follows = torch.rand(ids.shape, generator=generator) < 0.5
        for t in range(1, ids.shape[1]):
            ids[:, t] = torch.where(follows[:, t], (5 * ids[:, t - 1] + 1) % shape.vocab, ids[:, t])
        made.append((ids[:, :-1].contiguous(), ids[:, 1:].contiguous()))
    return made


def same_init(model: nn.Module) -> None:
    """Matrices from N(0, 0.02), so that the losses of the contenders can be compared; norms stay at one."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.02)


def fused_adamw(model: nn.Module) -> torch.optim.AdamW:
    """The optimizer of every peer; llmtrain is configured to the same numbers."""
    return torch.optim.AdamW(model.parameters(), lr=LR, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY, fused=True)
