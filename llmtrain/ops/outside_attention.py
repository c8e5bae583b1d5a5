"""Attention of the packages flash-attn and xformers, where they are installed. Not run on hardware: the calls are checked against the
packages' signatures, and what they compute against a stand-in. So `auto` does not take them; a configuration may name them."""

import importlib
from itertools import accumulate
from typing import Any

import torch
from llmtrain_kernels.contract import check_attention
from llmtrain_kernels.mask import Mask
from torch import Tensor

from llmtrain.ops.attention_shapes import last_key_is_last_query, narrow, one_width, packed_lengths
from llmtrain.ops.registry import Call, register
from llmtrain.ops.sdpa import attention_sdpa
from llmtrain.packages import needs

HALVES = (torch.float16, torch.bfloat16)


def _flash_supports(call: Call) -> str | None:
    if call.capability is not None and call.capability < (8, 0):
        return f"needs compute capability 8.0, not {call.capability[0]}.{call.capability[1]}"
    if max(call.head_dim or 0, call.value_head_dim or 0) > 256:
        return f"takes head dims up to 256, not {max(call.head_dim or 0, call.value_head_dim or 0)}"
    if call.return_lse and call.backward:
        return "gives a log-sum-exp without a gradient"
    return None


def _handed_over(mask: Mask, q: Tensor, k: Tensor, *, q_offset: int, kv_offset: int) -> bool:
    return not last_key_is_last_query(mask, queries=q.shape[2], keys=k.shape[2], q_offset=q_offset, kv_offset=kv_offset)


@register(
    "attention",
    "flash_attn",
    devices=("cuda",),
    dtypes=HALVES,
    speed=-0.1,
    probe=needs("flash_attn", "flash-attn"),
    supports=_flash_supports,
)
def attention_flash_attn(
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
    """Shapes as in `attention_reference`. Documents go packed in one call. Written for flash-attn 2.7 and 2.8.

    Calls whose last query does not stand at the last key, and documents with a cache, are handed to `attention_sdpa`; ValueError if they
    ask for the log-sum-exp, or if a gradient would go through it.
    """
    check_attention(q, k, v, mask, q_offset=q_offset, kv_offset=kv_offset)
    if return_lse and torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        raise ValueError("kernels.attention=flash_attn gives a log-sum-exp without a gradient; use kernels.attention: reference")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if _handed_over(mask, q, k, q_offset=q_offset, kv_offset=kv_offset):
        offsets = {"q_offset": q_offset, "kv_offset": kv_offset}
        return attention_sdpa(q, k, v, mask=mask, scale=scale, return_lse=return_lse, **offsets)
    width, rows = v.shape[-1], q.shape[0]
    q, k, v = (x.transpose(1, 2) for x in one_width(q, k, v))  # [B,S,H,d]
    given = _flash(q, k, v, mask, scale, return_lse)
    out, lse = (given[0], given[1]) if return_lse else (given, None)
    out = narrow(out, width).unflatten(0, (rows, -1)) if out.dim() == 3 else narrow(out, width)
    if lse is not None and lse.dim() == 2:  # packed: [H, B*S]
        lse = lse.unflatten(1, (rows, -1)).transpose(0, 1)
    return out.transpose(1, 2) if lse is None else (out.transpose(1, 2), lse)


def _flash(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float, return_lse: bool) -> Any:
    """[B,S,H,d] -> what the package gives: packed [B*S,H,d] if there are documents."""
    package = importlib.import_module("flash_attn")
    options = {
        "softmax_scale": scale,
        "causal": mask.causal,
        "window_size": (-1, -1) if mask.window is None else (mask.window - 1, 0),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "return_attn_probs": return_lse,
    }
    lengths = packed_lengths(mask)
    if lengths is None:
        return package.flash_attn_func(q, k, v, **options)
    ends = mask.once(("flash_attn", q.device), lambda _: torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=q.device))
    longest = max(lengths)
    return package.flash_attn_varlen_func(*(x.flatten(0, 1) for x in (q, k, v)), ends, ends, longest, longest, **options)


def _xformers_supports(call: Call) -> str | None:
    return "returns no log-sum-exp" if call.return_lse else None


@register(
    "attention",
    "xformers",
    devices=("cuda",),
    dtypes=(*HALVES, torch.float32),
    speed=-0.2,
    probe=needs("xformers", "xformers"),
    supports=_xformers_supports,
    deterministic=False,
)
def attention_xformers(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask,
    scale: float | None = None,
    q_offset: int = 0,
    kv_offset: int = 0,
    return_lse: bool = False,
) -> Tensor:
    """Shapes as in `attention_reference`. Documents go packed in one call; shared keys are repeated, since the package's grouped form has
    no backward. Written for xformers 0.0.35.

    Calls whose last query does not stand at the last key, and documents with a cache, are handed to `attention_sdpa`. Raises ValueError for
    `return_lse`.
    """
    if return_lse:
        raise ValueError("kernels.attention=xformers returns no log-sum-exp; use kernels.attention: reference")
    check_attention(q, k, v, mask, q_offset=q_offset, kv_offset=kv_offset)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if _handed_over(mask, q, k, q_offset=q_offset, kv_offset=kv_offset):
        return attention_sdpa(q, k, v, mask=mask, scale=scale, q_offset=q_offset, kv_offset=kv_offset)
    rows, repeat = q.shape[0], q.shape[1] // k.shape[1]
    k, v = (x if repeat == 1 else x.repeat_interleave(repeat, dim=1) for x in (k, v))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B,S,H,d]
    packed = packed_lengths(mask) is not None
    if packed:
        q, k, v = (x.flatten(0, 1)[None] for x in (q, k, v))
    bias = mask.once(("xformers", q.device), lambda mask: _bias(mask, q.device))
    out = importlib.import_module("xformers.ops").memory_efficient_attention(q, k, v, attn_bias=bias, p=0.0, scale=scale)
    return (out[0].unflatten(0, (rows, -1)) if packed else out).transpose(1, 2)


def _bias(mask: Mask, device: torch.device) -> Any:
    """The mask as one of the package's own; None if nothing is hidden."""
    biases = importlib.import_module("xformers.ops.fmha.attn_bias")
    lengths = packed_lengths(mask)
    if lengths is None:
        bias = biases.LowerTriangularFromBottomRightMask() if mask.causal else None
    else:
        bias = biases.BlockDiagonalMask.from_seqlens(lengths, device=device)
        bias = bias.make_causal() if mask.causal else bias
    return bias if mask.window is None else bias.make_local_attention(mask.window)
