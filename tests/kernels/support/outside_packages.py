"""Stand-ins for flash-attn and xformers on the CPU: the packages' signatures, and what their documentation says is computed."""

from types import SimpleNamespace

import torch
from torch import Tensor


def dense(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """[B,S,H,d] with booleans [S,T] -> out [B,S,H,dv], lse [B,H,S]; rows without a key are zeros."""
    repeat = q.shape[2] // k.shape[2]
    q, k, v = (x.transpose(1, 2).double() for x in (q, k.repeat_interleave(repeat, 2), v.repeat_interleave(repeat, 2)))
    scores = (q @ k.mT * scale).masked_fill(hidden, float("-inf"))
    lse = scores.logsumexp(-1, keepdim=True)
    return ((scores - lse).exp().nan_to_num(0.0) @ v).transpose(1, 2), lse.squeeze(-1).float()


def flash_hidden(queries: int, keys: int, causal: bool, window_size: tuple[int, int]) -> Tensor:
    """flash_attn_func's docstring: aligned at the lower right corner, a window's bounds inclusive."""
    row, column = torch.arange(queries)[:, None] + keys - queries, torch.arange(keys)[None]
    left, right = window_size
    hidden = torch.zeros(queries, keys, dtype=torch.bool)
    if left >= 0:
        hidden |= column < row - left
    if right >= 0:
        hidden |= column > row + right
    return hidden | (column > row) if causal else hidden


# The signatures of flash-attn 2.8.
def flash_attn_func(
    q,
    k,
    v,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    assert q.dim() == 4 and q.shape[-1] == v.shape[-1] and q.dtype in (torch.float16, torch.bfloat16)
    out, lse = dense(q, k, v, flash_hidden(q.shape[1], k.shape[1], causal, window_size), softmax_scale)
    return (out.to(q.dtype), lse, None) if return_attn_probs else out.to(q.dtype)


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    block_table=None,
):
    assert q.dim() == 3 and cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32 and cu_seqlens_q[-1] == len(q)
    cuts = [cu.tolist() for cu in (cu_seqlens_q, cu_seqlens_k)]
    assert (cu_seqlens_q.diff().max(), cu_seqlens_k.diff().max()) == (max_seqlen_q, max_seqlen_k)
    outs, lses = [], []
    for a, b, c, d in zip(cuts[0], cuts[0][1:], cuts[1], cuts[1][1:]):
        out, lse = dense(q[None, a:b], k[None, c:d], v[None, c:d], flash_hidden(b - a, d - c, causal, window_size), softmax_scale)
        outs, lses = [*outs, out[0]], [*lses, lse[0]]
    out, lse = torch.cat(outs).to(q.dtype), torch.cat(lses, 1)
    return (out, lse, None) if return_attn_probs else out


FLASH_ATTN = SimpleNamespace(flash_attn_func=flash_attn_func, flash_attn_varlen_func=flash_attn_varlen_func)


# The signature of xformers 0.0.35; its masks are the package's own.
def memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None):
    assert query.shape[2] == key.shape[2] and query.dtype in (torch.float16, torch.bfloat16, torch.float32)
    sizes = (query.shape[1], key.shape[1])
    hidden = torch.zeros(sizes, dtype=torch.bool) if attn_bias is None else attn_bias.materialize(sizes, device="cpu") != 0
    return dense(query, key, value, hidden, scale)[0].to(query.dtype)
