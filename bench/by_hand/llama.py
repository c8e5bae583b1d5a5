"""The Llama of these scripts, on one rank. B rows, S positions, D width, H heads of d, V vocabulary."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from train_peers.shape import Shape

from llmtrain.ops import Mask
from llmtrain.ops.cross_entropy import cross_entropy_chunked
from llmtrain.ops.norm import rms_norm_closed_form
from llmtrain.ops.rope import rope_halves
from llmtrain.ops.tiled_attention import attention_tiled

NORM_EPS, ROPE_BASE = 1e-5, 10_000.0
CAUSAL = Mask()


def rope_table(positions: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """cos and sin [1,1,S,d] of positions [S]."""
    frequencies = ROPE_BASE ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
    angles = positions[:, None].float() * frequencies.float()
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), -1)[None, None], torch.cat((sin, sin), -1)[None, None]


class RMSNorm(nn.Module):
    """Over the last dim."""

    def __init__(self, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm_closed_form(x, self.weight, NORM_EPS)


class Attention(nn.Module):
    """[B,S,D] -> [B,S,D]."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.head = shape.dim // shape.heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(shape.dim, shape.dim, bias=False) for _ in range(4))

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        q, k, v = (proj(x).unflatten(-1, (-1, self.head)).transpose(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj))
        out = self.attend(rope_halves(q, *rope), rope_halves(k, *rope), v)
        return self.out_proj(out.transpose(1, 2).flatten(2))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[B,H,S,d] each -> [B,H,S,d]."""
        return attention_tiled(q, k, v, mask=CAUSAL)


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(shape.dim, shape.ffn, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(shape.ffn, shape.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Pre-norm attention and feed-forward."""

    def __init__(self, shape: Shape, attention: type[Attention] = Attention):
        super().__init__()
        self.attention_norm, self.ffn_norm = RMSNorm(shape.dim), RMSNorm(shape.dim)
        self.attention, self.ffn = attention(shape), FeedForward(shape)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rope)
        return x + self.ffn(self.ffn_norm(x))


class Head(nn.Module):
    """The summed cross-entropy of hidden states [B,S,D] and targets [B,S]."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.weight, self.rows = nn.Parameter(torch.empty(shape.vocab, shape.dim)), shape.tokens

    def forward(self, hidden: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy_chunked(hidden.flatten(0, 1), self.weight, targets.flatten(), chunk=self.rows)


class Llama(nn.Module):
    """Tokens and targets [B,S] -> summed cross-entropy."""

    def __init__(self, shape: Shape, attention: type[Attention] = Attention):
        super().__init__()
        self.embedding = nn.Embedding(shape.vocab, shape.dim)
        self.blocks = nn.ModuleDict({str(i): Block(shape, attention) for i in range(shape.layers)})
        self.final_norm, self.head = RMSNorm(shape.dim), Head(shape)
        self.width = shape.dim // shape.heads

    def forward(self, tokens: Tensor, targets: Tensor, positions: Tensor) -> Tensor:
        rope, x = rope_table(positions, self.width), self.embedding(tokens)
        for block in self.blocks.values():
            x = block(x, rope)
        return self.head(self.final_norm(x), targets)
