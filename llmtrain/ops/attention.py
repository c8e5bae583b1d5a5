"""Attention by the formula: the reference, the one place where an S x T mask exists."""

import torch
from llmtrain_kernels.contract import check_attention
from llmtrain_kernels.mask import Mask
from torch import Tensor

from llmtrain.ops.registry import register


def visible(mask: Mask, *, rows: int, queries: range, keys: range, device: torch.device) -> Tensor:
    """The mask as booleans [B or 1, 1, S, T], True where the query sees the key; positions count from 0."""
    query = torch.arange(queries.start, queries.stop, device=device)[:, None]
    key = torch.arange(keys.start, keys.stop, device=device)[None, :]
    seen = torch.ones(1, 1, len(queries), len(keys), dtype=torch.bool, device=device)
    if mask.causal:
        seen = seen & (key <= query)
    if mask.window is not None:
        seen = seen & (key > query - mask.window)
    if mask.documents is not None:
        ends = [torch.tensor(lengths, device=device).cumsum(0) for lengths in mask.documents]
        same = [torch.bucketize(query, end, right=True) == torch.bucketize(key, end, right=True) for end in ends]
        seen = seen & torch.stack(same)[:, None]
    return seen


@register("attention", "reference", speed=0)
def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask,
    scale: float | None = None,
    q_offset: int = 0,
    kv_offset: int = 0,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention by the formula, with an S x T mask, computed in fp32 (fp64 for fp64).

    q [B,H,S,d], k [B,K,T,d], v [B,K,T,dv]; `scale` is 1/sqrt(d) by default. Returns out [B,H,S,dv] in q's dtype and, if asked,
    lse [B,H,S] in the computing dtype: log of the sum of exp(scale * q.k) over the keys seen.
    """
    check_attention(q, k, v, mask, q_offset=q_offset, kv_offset=kv_offset)
    high = torch.promote_types(q.dtype, torch.float32)
    repeat = q.shape[1] // k.shape[1]
    key, value = (x.to(high).repeat_interleave(repeat, dim=1) for x in (k, v))
    scores = q.to(high) @ key.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)  # [B,H,S,T]
    queries, keys = range(q_offset, q_offset + q.shape[2]), range(kv_offset, kv_offset + k.shape[2])
    seen = visible(mask, rows=q.shape[0], queries=queries, keys=keys, device=q.device)
    # A row without a key keeps finite scores, so that its gradients are zeros rather than NaN; it is cleared at the end.
    empty = ~seen.any(-1, keepdim=True)
    scores = scores.masked_fill(~seen & ~empty, float("-inf"))
    lse = torch.logsumexp(scores, dim=-1, keepdim=True)
    out = (torch.exp(scores - lse) @ value).masked_fill(empty, 0.0).to(q.dtype)
    return (out, lse.masked_fill(empty, float("-inf")).squeeze(-1)) if return_lse else out
