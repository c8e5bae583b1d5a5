"""Grouped-query attention (arXiv 2305.13245)."""

from functools import partial

from torch import Tensor, nn

from llmtrain.config.model import ModelConfig
from llmtrain.model.cache import LayerCache
from llmtrain.model.norm import RMSNorm


class Attention(nn.Module):
    """Project, normalise per head if asked, rotate, attend, project back: [B,S,D] -> [B,S,D].

    Another kind of attention derives from this. The number of heads is read from what `qkv` gives, so projections sharded over heads from
    outside just work.
    """

    def __init__(self, cfg: ModelConfig, *, ops):
        super().__init__()
        a, self.ops, self.head_dim = cfg.attention, ops, cfg.head_dim
        self.q_proj = nn.Linear(cfg.hidden, a.heads * cfg.head_dim, bias=a.qkv_bias)
        self.k_proj = nn.Linear(cfg.hidden, cfg.kv_heads * cfg.head_dim, bias=a.qkv_bias)
        self.v_proj = nn.Linear(cfg.hidden, cfg.kv_heads * cfg.head_dim, bias=a.qkv_bias)
        self.out_proj = nn.Linear(a.heads * cfg.head_dim, cfg.hidden, bias=a.out_bias)
        self.q_norm = RMSNorm(cfg.head_dim, cfg.norm.eps, ops=ops) if a.qk_norm else None
        self.k_norm = RMSNorm(cfg.head_dim, cfg.norm.eps, ops=ops) if a.qk_norm else None

    def forward(self, x: Tensor, *, rope: tuple[Tensor, Tensor] | None, mask, cache: LayerCache | None = None) -> Tensor:
        """x [B,S,D]; rope is (cos, sin) [B or 1,1,S,d], None without rotation; mask is a Mask."""
        return self.output(self.attend(*self.project(x, rope=rope), mask=mask, cache=cache))

    def project(self, x: Tensor, *, rope: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
        """x [B,S,D] -> rotated q [B,H,S,d] and k [B,K,S,d], and v [B,K,S,d]."""
        q, k, v = (flat.unflatten(-1, (-1, self.head_dim)) for flat in self.qkv(x))  # [B,S,H or K,d]
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # [B,H or K,S,d]
        if rope is not None:
            q, k = self.ops.rope(q, *rope), self.ops.rope(k, *rope)
        return q, k, v

    def qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [B,S,D] -> queries [B,S,H*d], keys and values [B,S,K*d]; what shards heads over ranks replaces this and `output`."""
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, mask, cache: LayerCache | None = None) -> Tensor:
        """The attention op on what `project` gave, with the keys and values of `cache` before its own: [B,H,S,d]."""
        attend = self.ops.attention if cache is None else partial(cache.attend, ops=self.ops)
        return attend(q, k, v, mask=mask)

    def output(self, out: Tensor) -> Tensor:
        """[B,H,S,d] -> [B,S,D]."""
        return self.out_proj(out.transpose(1, 2).flatten(2))
