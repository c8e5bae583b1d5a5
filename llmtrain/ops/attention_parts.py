"""Attention to a part of the keys, with what is needed to merge parts: forward gives the log-sum-exp, backward takes that of all parts.

With out and lse of the merged result, the gradients of a part need nothing else of the others, so parts may be computed in turn and
anywhere: ring attention is made of them. Both ops are called without autograd, and any implementation of one fits any of the other.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from llmtrain.ops.registry import Call, register

BLOCK = 256
"""Queries of the reference whose scores exist at once."""

aten = torch.ops.aten


def _blocks(queries: int, keys: int, causal: bool) -> Iterator[tuple[slice, int]]:
    """Blocks of queries, each with the number of keys that it sees."""
    for first in range(0, queries, BLOCK):
        last = min(first + BLOCK, queries)
        yield slice(first, last), last if causal else keys


def _fold(x: Tensor, block: slice, kv_heads: int) -> Tensor:
    """[B,H,m,d] -> [B,K,G*b,d] of the block's b queries: the G query heads of one key head stand below each other."""
    return x[:, :, block].unflatten(1, (kv_heads, -1)).flatten(2, 3)


def _scores(q: Tensor, k: Tensor, scale: float, block: slice, causal: bool) -> Tensor:
    """Folded queries [B,K,G*b,d], keys [B,K,n,d] -> scores [B,K,G*b,n]."""
    scores = q @ k.transpose(-1, -2) * scale
    if causal:
        rows = block.stop - block.start
        hidden = torch.ones(rows, rows, dtype=torch.bool, device=q.device).triu_(1)
        scores.unflatten(2, (-1, rows))[..., block].masked_fill_(hidden, float("-inf"))
    return scores


# An operator of torch, so that selective recomputation sees one call rather than the scores inside.
@torch.library.custom_op("llmtrain::attention_part", mutates_args=())
def _part(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    high, heads = torch.promote_types(q.dtype, torch.float32), k.shape[1]
    out, lse = q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3], dtype=high)
    for block, seen in _blocks(q.shape[2], k.shape[2], causal):
        query, key, value = (x.to(high) for x in (_fold(q, block, heads), k[:, :, :seen], v[:, :, :seen]))
        scores = _scores(query, key, scale, block, causal)
        total = torch.logsumexp(scores, dim=-1, keepdim=True)
        lse[:, :, block] = total.view(*q.shape[:2], -1)
        out[:, :, block] = (torch.exp(scores - total) @ value).view(*q.shape[:2], -1, v.shape[3])
    return out, lse


@register("attention_part", "reference", speed=0)
def attention_part_reference(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """q [B,H,m,d], k [B,K,n,d], v [B,K,n,dv] -> out [B,H,m,dv] in q's dtype, lse [B,H,m] in fp32 (fp64 for fp64).

    Every query sees every key or, with `causal` (m = n), those up to its own place. Softmax and products in fp32 or fp64.
    """
    return _part(q, k, v, causal, scale)


@register("attention_part_backward", "reference", speed=0)
def attention_part_backward_reference(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v through this part, for `grad`, `out` and `lse` of all parts merged; in fp32 or fp64."""
    high, heads = lse.dtype, k.shape[1]
    grads = grad_q, grad_k, grad_v = [torch.zeros(x.shape, dtype=high, device=x.device) for x in (q, k, v)]
    delta = (grad.to(high) * out.to(high)).sum(-1, keepdim=True)  # [B,H,m,1]
    for block, seen in _blocks(q.shape[2], k.shape[2], causal):
        query, above, shift, total = (_fold(x, block, heads).to(high) for x in (q, grad, delta, lse.unsqueeze(-1)))
        key, value = k[:, :, :seen].to(high), v[:, :, :seen].to(high)
        probabilities = torch.exp(_scores(query, key, scale, block, causal) - total)
        slope = (above @ value.transpose(-1, -2) - shift) * probabilities * scale
        grad_q[:, :, block] = (slope @ key).view(*q.shape[:2], -1, q.shape[3])
        grad_k[:, :, :seen] += slope.transpose(-1, -2) @ query
        grad_v[:, :, :seen] += probabilities.transpose(-1, -2) @ above
    return tuple(grads)


FLASH = ("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention_for_cpu_backward")
"""PyTorch's flash kernel for the CPU. Its operators are private, so they are looked up by name."""


def _flash_probe() -> str | None:
    return None if all(hasattr(aten, name) for name in FLASH) else "needs operators of torch that this version lacks"


def _flash_supports(call: Call) -> str | None:
    return "is slower in float16" if call.dtype == torch.float16 else None


def _wide(d: int, *tensors: Tensor) -> list[Tensor]:
    """Head dims padded with zeros to d: the kernel wants one for q, k and v."""
    return [x if x.shape[-1] == d else F.pad(x, (0, d - x.shape[-1])) for x in tensors]


@register("attention_part", "flash", devices=("cpu",), speed=1, probe=_flash_probe, supports=_flash_supports)
def attention_part_flash(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """As the reference, by PyTorch's flash kernel for the CPU."""
    width = v.shape[-1]
    q, k, v = _wide(max(q.shape[-1], width), q, k, v)
    out, lse = getattr(aten, FLASH[0])(q, k, v, 0.0, causal, scale=scale)
    return out[..., :width], lse


@register("attention_part_backward", "flash", devices=("cpu",), speed=1, probe=_flash_probe, supports=_flash_supports)
def attention_part_backward_flash(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """As the reference, but in q's dtype, by PyTorch's flash kernel for the CPU."""
    width, value_width = q.shape[-1], v.shape[-1]
    grad, q, k, v, out = _wide(max(width, value_width), grad, q, k, v, out)
    grad_q, grad_k, grad_v = getattr(aten, FLASH[1])(grad, q, k, v, out, lse, 0.0, causal, scale=scale)
    return grad_q[..., :width], grad_k[..., :width], grad_v[..., :value_width]
