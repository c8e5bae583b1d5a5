"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1; as in DeepSeek-V3 and Pangu Ultra MoE)."""

import torch
from torch import Tensor, nn

from llmtrain.config.model import ModelConfig
from llmtrain.model.attention import Attention
from llmtrain.model.norm import RMSNorm


class LatentAttention(Attention):
    """As Attention, with queries, and keys and values, made from narrow vectors: [B,S,D] -> [B,S,D].

    Of a head's queries and keys the first `nope_dim` numbers know no position, the last `rope_dim` are rotated; those of the key are one
    vector for all heads. Cached are keys and values of all heads, not the narrow vector.
    """

    def __init__(self, cfg: ModelConfig, *, ops):
        nn.Module.__init__(self)
        a, self.ops = cfg.attention, ops
        eps = a.norm_eps or cfg.norm.eps
        self.head_dim, self.rope_dim, self.kv_rank = cfg.head_dim, a.rope_dim, a.kv_rank
        self.kv_dims = [a.nope_dim, a.value_dim]
        # The op divides by the root of the head dim, whatever is in its way; another scale goes into the queries.
        self.query_factor = None if a.softmax_scale is None else a.softmax_scale * cfg.head_dim**0.5
        self.q_down_proj = self.q_norm = None
        if a.query_rank is not None:
            self.q_down_proj = nn.Linear(cfg.hidden, a.query_rank, bias=False)
            self.q_norm = RMSNorm(a.query_rank, eps, ops=ops)
        self.q_up_proj = nn.Linear(a.query_rank or cfg.hidden, a.heads * cfg.head_dim, bias=False)
        self.kv_down_proj = nn.Linear(cfg.hidden, a.kv_rank + a.rope_dim, bias=False)
        self.kv_norm = RMSNorm(a.kv_rank, eps, ops=ops)
        self.kv_up_proj = nn.Linear(a.kv_rank, a.heads * sum(self.kv_dims), bias=False)
        self.out_proj = nn.Linear(a.heads * a.value_dim, cfg.hidden, bias=False)

    def project(self, x: Tensor, *, rope: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
        """x [B,S,D] -> q and k [B,H,S,nope+rope], the rope part rotated, and v [B,H,S,dv]."""
        return self.expand(*self.narrow(x), *(rope or ()))

    def expand(self, queries: Tensor, latent: Tensor, shared: Tensor, *rope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What `narrow` gave, and cos and sin if keys and queries are rotated -> what `project` gives."""
        q, kv, shared = self.widen(queries, latent, shared)
        q = q.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # [B,H,S,d]
        k, v = kv.unflatten(-1, (-1, sum(self.kv_dims))).transpose(1, 2).split(self.kv_dims, -1)
        q_rope, k_rope = q[..., -self.rope_dim :], shared[:, None]  # [B,H or 1,S,rope]
        if rope:
            q_rope, k_rope = self.ops.rope(q_rope, *rope), self.ops.rope(k_rope, *rope)
        q = torch.cat((q[..., : -self.rope_dim], q_rope), -1)
        k = torch.cat((k, k_rope.expand(-1, k.shape[1], -1, -1)), -1)
        return q if self.query_factor is None else q * self.query_factor, k, v

    def narrow(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [B,S,D] -> what queries come out of, [B,S,query_rank or D], keys and values, [B,S,kv_rank], and rotated keys, [B,S,rope]."""
        queries = x if self.q_down_proj is None else self.q_norm(self.q_down_proj(x))
        latent, shared = self.kv_down_proj(x).split([self.kv_rank, self.rope_dim], -1)
        return queries, self.kv_norm(latent), shared

    def widen(self, queries: Tensor, latent: Tensor, shared: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What `narrow` gave -> queries [B,S,H*d], keys with values [B,S,H*(nope+dv)], and `shared`; what shards heads replaces this."""
        return self.q_up_proj(queries), self.kv_up_proj(latent), shared
