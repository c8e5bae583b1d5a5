"""Softmax attention by its formula, with nothing of the code under test but the description of a mask."""

import torch
from llmtrain_kernels.mask import Mask
from torch import Tensor


def seen(mask: Mask, *, rows: int, queries: range, keys: range) -> Tensor:
    """Booleans [rows,S,T]: whether the query at a position sees the key at a position, by the sentences of `Mask`."""
    query, key = torch.tensor(queries)[:, None], torch.tensor(keys)[None, :]
    visible = torch.ones(len(queries), len(keys), dtype=torch.bool)
    if mask.causal:
        visible &= key <= query
    if mask.window is not None:
        visible &= query - key < mask.window
    if mask.documents is None:
        return visible.expand(rows, -1, -1)
    found = []
    for lengths in mask.documents:
        document = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
        found.append(visible & (document[query] == document[key]))
    return torch.stack(found)


def formula(
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
    """q [B,H,S,d], k [B,K,T,d], v [B,K,T,dv] in float64 -> out [B,H,S,dv], lse [B,H,S]; zeros and minus infinity where no key is seen."""
    assert q.dtype == torch.float64
    group = q.shape[1] // k.shape[1]
    places = {"queries": range(q_offset, q_offset + q.shape[2]), "keys": range(kv_offset, kv_offset + k.shape[2])}
    visible = seen(mask, rows=q.shape[0], **places).to(q.device)[:, None]
    k, v = (torch.repeat_interleave(x, group, dim=1) for x in (k, v))
    scores = torch.einsum("bhsd,bhtd->bhst", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    # The largest score is subtracted as a number, and weights of hidden keys are zeros: no infinity meets the gradients.
    shift = scores.detach().masked_fill(~visible, -1e300).amax(-1, keepdim=True)
    weights = torch.where(visible, torch.exp(torch.where(visible, scores - shift, 0.0)), 0.0)
    total = weights.sum(-1, keepdim=True)
    some = total > 0
    out = torch.einsum("bhst,bhte->bhse", weights / torch.where(some, total, 1.0), v)
    lse = torch.where(some, torch.log(torch.where(some, total, 1.0)) + shift, float("-inf")).squeeze(-1)
    return (out, lse) if return_lse else out
