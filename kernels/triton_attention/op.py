"""The kernels as operators of torch: `llmtrain_kernels::triton_attention` and its backward, which torch.compile leaves whole."""

from typing import Any

import torch
from llmtrain_kernels.contract import check_attention
from llmtrain_kernels.mask import Mask
from llmtrain_kernels.triton_attention.available import unavailable
from llmtrain_kernels.triton_attention.intervals import Layout, documents
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDEST = 256


def attention(
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
    """Flash attention (arXiv 2205.14135, 2307.08691), summed in fp32.

    q [B,H,S,d], k [B,K,T,d], v [B,K,T,dv], head dims up to 256, one dtype of fp32, bf16 and fp16; `scale` is 1/sqrt(d) by default. Returns
    out [B,H,S,dv] in q's dtype and, if asked, lse [B,H,S] in fp32, both with gradients. Query i stands at position q_offset + i, key j at
    kv_offset + j. Gradients are the same every time. Raises ValueError for what does not fit, RuntimeError where Triton cannot run.
    """
    check_attention(q, k, v, mask, q_offset=q_offset, kv_offset=kv_offset)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    _check(q, k, v, scale)
    counts, lengths = mask.once("counts and lengths", documents)
    out, lse = attention_op(q, k, v, counts, lengths, mask.causal, mask.window or 0, scale, q_offset, kv_offset)
    return (out, lse) if return_lse else out


def _check(q: Tensor, k: Tensor, v: Tensor, scale: float) -> None:
    if q.dtype not in DTYPES or not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"attention in Triton: q {q.dtype}, k {k.dtype}, v {v.dtype}; needed one of float32, bfloat16, float16 for all")
    if max(q.shape[-1], v.shape[-1]) > WIDEST:
        raise ValueError(f"attention in Triton: head dims {q.shape[-1]} and {v.shape[-1]}; needed at most {WIDEST}")
    if scale <= 0:
        raise ValueError(f"attention in Triton: scale={scale}; needed above 0, since maxima are taken before scaling")
    reason = unavailable(q.device.type)
    if reason:
        raise RuntimeError(f"attention in Triton {reason}")


def _straight(*tensors: Tensor) -> list[Tensor]:
    """Neighbours of the last dim next to each other in memory; other strides are free."""
    return [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]


def _launch(*tensors: Tensor, layout: Layout, scale: float) -> Any:
    from llmtrain_kernels.triton_attention.launch import Launch  # imports Triton

    return Launch(*tensors, layout=layout, scale=scale)


def _outputs(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    batch, heads, queries, _ = q.shape
    out = q.new_empty(batch, queries, heads, v.shape[3]).transpose(1, 2)  # [B,S,H,dv] in memory, as out_proj reads it
    return out, q.new_empty(batch, heads, queries, dtype=torch.float32)


@torch.library.custom_op("llmtrain_kernels::triton_attention", mutates_args=())
def attention_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    counts: list[int],
    lengths: list[int],
    causal: bool,
    window: int,
    scale: float,
    q_offset: int,
    kv_offset: int,
) -> tuple[Tensor, Tensor]:
    """Documents per batch row and their lengths (none: empty), a window (none: 0) -> out [B,H,S,dv], lse [B,H,S]."""
    out, lse = _outputs(q, v)
    layout = Layout(tuple(counts), tuple(lengths), causal, window, q_offset, kv_offset)
    _launch(*_straight(q, k, v), layout=layout, scale=scale).forward(out, lse)
    return out, lse


@attention_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _outputs(q, v)


@torch.library.custom_op("llmtrain_kernels::triton_attention_backward", mutates_args=())
def attention_backward_op(
    grad: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    counts: list[int],
    lengths: list[int],
    causal: bool,
    window: int,
    scale: float,
    q_offset: int,
    kv_offset: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    grads = tuple(torch.empty_like(x) for x in (q, k, v))
    grad, out, q, k, v = _straight(grad, out, q, k, v)
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    layout = Layout(tuple(counts), tuple(lengths), causal, window, q_offset, kv_offset)
    _launch(q, k, v, layout=layout, scale=scale).backward(grad, grad_lse, out, lse.contiguous(), grads)
    return grads


@attention_backward_op.register_fake
def _(grad: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _keep(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    q, k, v, *rest = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, *output)
    ctx.rest = rest


def _backward(ctx: Any, grad: Tensor | None, grad_lse: Tensor | None) -> tuple:
    if torch.is_grad_enabled():
        raise RuntimeError("attention in Triton has no second derivative; use kernels.attention: reference")
    q, k, v, out, lse = ctx.saved_tensors
    grad = torch.zeros_like(out) if grad is None else grad
    return *attention_backward_op(grad, grad_lse, q, k, v, out, lse, *ctx.rest), *(None,) * len(ctx.rest)


attention_op.register_autograd(_backward, setup_context=_keep)
