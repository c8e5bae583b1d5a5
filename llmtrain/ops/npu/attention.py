"""Attention by npu_fusion_attention: one call for a whole batch, packed documents included.

Its first version serves: v2 adds position biases and a rope part that no model here uses, v3 takes lengths as tensors for graph capture.
"""

from collections.abc import Iterator
from itertools import accumulate
from typing import NamedTuple

import torch
from llmtrain_kernels.contract import check_attention
from llmtrain_kernels.mask import Mask
from torch import Tensor

from llmtrain.ops.attention_shapes import narrow, one_width, packed_lengths
from llmtrain.ops.npu import gateway
from llmtrain.ops.npu.gateway import DTYPES, NAME, SPEED, needs, reject
from llmtrain.ops.npu.masks import Sparse, sparse
from llmtrain.ops.registry import Call, register
from llmtrain.ops.sdpa import attention_sdpa

LARGEST_HEAD = 768
MOST_HEADS = 256
MOST_DOCUMENTS = 1024
"""Lengths per call in the packed layout."""

MOST_TOKENS = 1 << 20
"""Tokens per call in the packed layout."""


def supports_heads(call: Call) -> str | None:
    """Why the operator cannot take the heads of `call`, or None."""
    widest = max(call.head_dim or 0, call.value_head_dim or 0)
    if widest > LARGEST_HEAD:
        return f"takes head sizes up to {LARGEST_HEAD}, not {widest}"
    if (call.heads or 0) > MOST_HEADS:
        return f"takes up to {MOST_HEADS} heads, not {call.heads}"
    return None


def _supports(call: Call) -> str | None:
    if call.return_lse and call.backward:
        return "gives a log-sum-exp without a gradient"
    return supports_heads(call)


@register("attention", NAME, devices=("npu",), dtypes=DTYPES, speed=SPEED, probe=needs("npu_fusion_attention"), supports=_supports)
def attention_npu(
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
    """Shapes as in `attention_reference`; the log-sum-exp has no gradient.

    Documents go packed in one call (per 1,024 of them), other masks as modes of the kernel. Calls with a query that sees no key, and
    documents together with offsets, are handed to `attention_sdpa`. A narrower v (or q and k) is padded with zeros: what the kernel
    accepts there depends on the version of CANN. Raises ValueError where the kernel would compute something else.
    """
    check_attention(q, k, v, mask, q_offset=q_offset, kv_offset=kv_offset)
    check_heads("attention", q, k, v)
    if return_lse and torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        raise reject("attention", "return_lse=True with gradients", "torch.no_grad(), since the operator's log-sum-exp has none")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    lengths = packed_lengths(mask)
    shift = q_offset - kv_offset
    plain = sparse(mask, queries=q.shape[2], keys=k.shape[2], shift=shift)
    packable = lengths is None or (shift == 0 and q.shape[2] == k.shape[2])
    if plain is None or not packable:
        if return_lse:
            raise reject("attention", f"return_lse with {mask}, offsets {q_offset} and {kv_offset}", "a mask that shows every query a key")
        return attention_sdpa(q, k, v, mask=mask, scale=scale, q_offset=q_offset, kv_offset=kv_offset)
    width = v.shape[-1]
    q, k, v = one_width(q, k, v)
    out, lse = _dense(q, k, v, plain, scale) if lengths is None else _documents(q, k, v, mask, lengths, scale, return_lse)
    out = narrow(out, width)
    return (out, lse) if return_lse else out


def check_heads(op: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise ValueError for what the operator passes over in silence or leaves to a kernel."""
    if not q.dtype == k.dtype == v.dtype:
        raise reject(op, f"q {q.dtype}, k {k.dtype}, v {v.dtype}", "one dtype")
    if q.shape[1] % k.shape[1] or k.shape[1] != v.shape[1] or q.shape[-1] != k.shape[-1] or k.shape[2] != v.shape[2]:
        raise reject(
            op, f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}", "q [B,H,S,d], k [B,K,T,d], v [B,K,T,dv], H a multiple of K"
        )
    if q.shape[1] > MOST_HEADS or max(q.shape[-1], v.shape[-1]) > LARGEST_HEAD:
        raise reject(op, f"{q.shape[1]} heads of {max(q.shape[-1], v.shape[-1])}", f"up to {MOST_HEADS} heads of up to {LARGEST_HEAD}")


def log_sum_exp(softmax_max: Tensor, softmax_sum: Tensor) -> Tensor:
    """[..,8] each, eight equal numbers, -> [..]."""
    return softmax_max[..., 0] + softmax_sum[..., 0].log()


def _dense(q: Tensor, k: Tensor, v: Tensor, kind: Sparse, scale: float) -> tuple[Tensor, Tensor]:
    out, top, total, *_ = gateway.fused("npu_fusion_attention")(q, k, v, q.shape[1], "BNSD", scale=scale, **kind.arguments(q.device))
    return out, log_sum_exp(top, total)


class _Run(NamedTuple):
    """Consecutive documents of one call: tokens first..last of the batch, and where each ends, counted from `first`."""

    first: int
    last: int
    ends: list[int]
    longest: int


def _runs(lengths: list[int]) -> Iterator[_Run]:
    """As many documents per call as the operator takes."""
    first, held = 0, []
    for length in [*lengths, None]:
        if held and (length is None or len(held) == MOST_DOCUMENTS or sum(held) + length > MOST_TOKENS):
            ends = list(accumulate(held))  # cumulative, without the leading 0 that other libraries want
            yield _Run(first, first + ends[-1], ends, max(held))
            first, held = first + ends[-1], []
        held.append(length)


def _documents(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, lengths: list[int], scale: float, return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    batch, _, seq, _ = q.shape
    packed = [x.transpose(1, 2).flatten(0, 1) for x in (q, k, v)]  # [B*S,H or K,d]
    runs = mask.once(("runs", MOST_DOCUMENTS, MOST_TOKENS), lambda _: list(_runs(lengths)))
    results = [_packed(*(x[run.first : run.last] for x in packed), mask, run, scale, return_lse) for run in runs]
    outs, sums = zip(*results)
    out = (outs[0] if len(outs) == 1 else torch.cat(outs)).unflatten(0, (batch, seq)).transpose(1, 2)
    return out, torch.cat(sums).unflatten(0, (batch, seq)).transpose(1, 2) if return_lse else None


def _packed(q: Tensor, k: Tensor, v: Tensor, mask: Mask, run: _Run, scale: float, return_lse: bool) -> tuple[Tensor, Tensor | None]:
    """[T,H,d], [T,K,d], [T,K,d] -> out [T,H,d], lse [T,H]."""
    kind = sparse(Mask(causal=mask.causal, window=mask.window), queries=run.longest, keys=run.longest, shift=0)
    assert kind is not None  # every token sees itself
    order = {"softmax_layout": "TND"} if return_lse else {}  # the default order of the statistics is [H,T]
    out, top, total, *_ = gateway.fused("npu_fusion_attention")(
        q, k, v, q.shape[1], "TND", scale=scale, actual_seq_qlen=run.ends, actual_seq_kvlen=run.ends, **kind.arguments(q.device), **order
    )
    return out, log_sum_exp(top, total) if return_lse else None
