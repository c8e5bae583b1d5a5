"""Attention by the kernels of attention.cu, as operators of torch: on NVIDIA GPUs, and on the CPU through the host shim."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from llmtrain_kernels.mask import Mask
from llmtrain_kernels.volta.arguments import KERNELS, ROWS, Arguments, Launch, View
from llmtrain_kernels.volta.ranges import Pattern, Ranges, keys_seen, queries_seeing
from torch import Tensor

HEAD_DIMS = (64, 128)
"""Head dims that kernels are built for; others up to the largest are padded with zeros."""

LOG2_E = math.log2(math.e)
PADDING = 64
"""Statistics of the queries are padded to a multiple of the widest column tile, so that the kernels need not ask where they end."""


def volta_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask,
    scale: float | None = None,
    q_offset: int = 0,
    kv_offset: int = 0,
    return_lse: bool = False,
    half_scores: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention in fp16 with fp32 sums; differentiable in q, k and v, through the log-sum-exp too. Every run gives the same bits.

    q [B,H,S,d], k [B,K,T,d], v [B,K,T,dv] in fp16, d and dv up to 128; `scale` above 0, by default 1/sqrt(d). Returns out [B,H,S,dv] in
    fp16 and, if asked, lse [B,H,S] in fp32. `half_scores` sums the forward pass's scores in fp16: faster on paper, and rounded
    (README.md). On a CPU it runs in the host shim, which checks rather than computes: some thousand times slower.
    Raises ValueError for other dtypes, shapes or scales, RuntimeError where the kernels cannot be built.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    _check(q, k, v, scale)
    mask.check(rows=q.shape[0], end=max(q_offset + q.shape[2], kv_offset + k.shape[2]))
    counts, lengths = mask.once("volta documents", _documents)
    wide = max(q.shape[-1], v.shape[-1])
    width = next(dim for dim in HEAD_DIMS if dim >= wide)
    padded = [F.pad(x, (0, width - x.shape[-1])) for x in (q, k, v)]
    out, lse = _forward(*padded, mask.causal, mask.window or 0, counts, lengths, [q_offset, kv_offset], scale, half_scores)
    out = out[..., : v.shape[-1]]
    return (out, lse) if return_lse else out


def _check(q: Tensor, k: Tensor, v: Tensor, scale: float) -> None:
    if not q.dtype == k.dtype == v.dtype == torch.float16:
        raise ValueError(f"volta_attention: q {q.dtype}, k {k.dtype}, v {v.dtype}; the kernels are for float16 (Volta has no bfloat16)")
    if q.shape[0] != k.shape[0] or k.shape[:3] != v.shape[:3] or q.shape[-1] != k.shape[-1] or q.shape[1] % k.shape[1]:
        shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        raise ValueError(f"volta_attention: {shapes}; needed q [B,H,S,d], k [B,K,T,d], v [B,K,T,dv] with H a multiple of K")
    if max(q.shape[-1], v.shape[-1]) > HEAD_DIMS[-1]:
        raise ValueError(f"volta_attention: head dims {q.shape[-1]} and {v.shape[-1]}; the kernels take up to {HEAD_DIMS[-1]}")
    if not scale > 0:
        raise ValueError(f"volta_attention: scale={scale}; it must be above 0")


def _documents(mask: Mask) -> tuple[list[int], list[int]]:
    """Documents of each batch row, and the lengths of all."""
    rows = mask.documents or ()
    return [len(row) for row in rows], [length for row in rows for length in row]


def _plain(x: Tensor) -> Tensor:
    """As the kernels read it: rows of consecutive numbers that start at multiples of 16 bytes."""
    fits = x.stride(-1) == 1 and all(stride % 8 == 0 for stride in x.stride()[:3]) and x.data_ptr() % 16 == 0
    return x if fits else x.clone(memory_format=torch.contiguous_format)


def _like(x: Tensor, heads: int) -> Tensor:
    """An empty [B,heads,S,d] that lies as [B,S,heads,d], which is how projections read it."""
    return x.new_empty(x.shape[0], x.shape[2], heads, x.shape[3]).transpose(1, 2)


def _pattern(q: Tensor, k: Tensor, causal: bool, window: int, counts: list[int], lengths: list[int], offsets: list[int]) -> Pattern:
    return Pattern(causal, window, tuple(counts), tuple(lengths), q.shape[2], k.shape[2], *offsets)


def _launch(launch: Launch) -> None:
    if not all(launch.blocks):
        return
    if launch.writes[0].device.type == "cuda":
        from llmtrain_kernels.volta import gpu

        gpu.launch(launch)
    else:
        from llmtrain_kernels.volta import shim

        shim.launch(launch)


def _prepare(name: str, tensors: dict[str, Tensor], ranges: Ranges, numbers: dict[str, Any], **pointers: Tensor) -> Launch:
    """A launch of kernel `name`; `tensors` are its views, of which `out` is written."""
    out, rows = tensors["out"], tensors["x"].shape[2]
    blocks = (-(-rows // ROWS), out.shape[1], out.shape[0])
    arguments = Arguments(
        seen=ranges.seen.data_ptr(),
        reach=ranges.reach.data_ptr(),
        seen_batch=rows if len(ranges.seen) > 1 else 0,
        reach_batch=blocks[0] if len(ranges.seen) > 1 else 0,
        rows=rows,
        cols=tensors["c"].shape[2],
        **{field: View.of(x) for field, x in tensors.items()},
        **{field: x.data_ptr() for field, x in pointers.items()},
        **numbers,
    )
    writes = (out, *(pointers[field] for field in ("lse",) if field in pointers))
    reads = (*ranges, *(x for field, x in tensors.items() if field != "out"), *(x for field, x in pointers.items() if field != "lse"))
    return Launch(KERNELS[name], out.shape[3], arguments, blocks, reads, writes)


# Operators of torch, so that torch.compile and selective recomputation see one call.
@torch.library.custom_op("llmtrain_kernels::volta_attention", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    window: int,
    counts: list[int],
    lengths: list[int],
    offsets: list[int],
    scale: float,
    half_scores: bool,
) -> tuple[Tensor, Tensor]:
    q, k, v = map(_plain, (q, k, v))
    out, lse = _like(q, q.shape[1]), q.new_empty(q.shape[:3], dtype=torch.float32)
    seen = keys_seen(_pattern(q, k, causal, window, counts, lengths, offsets), q.device)
    before = 2.0 ** math.floor(math.log2(scale)) if half_scores else 1.0
    numbers = {
        "query_heads": q.shape[1],
        "group": q.shape[1] // k.shape[1],
        "scale2": scale * LOG2_E / before,
        "before": before,
        "after": 1.0,
    }
    name = "volta_forward_half" if half_scores else "volta_forward"
    _launch(_prepare(name, {"x": q, "c": k, "d": v, "out": out}, seen, numbers, lse=lse))
    return out, lse


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _like(q, q.shape[1]), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("llmtrain_kernels::volta_attention_backward", mutates_args=())
def _backward(
    grad: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    window: int,
    counts: list[int],
    lengths: list[int],
    offsets: list[int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    grad, q, k, v = map(_plain, (grad, q, k, v))
    pattern = _pattern(q, k, causal, window, counts, lengths, offsets)
    by_query, by_key = keys_seen(pattern, q.device), queries_seeing(pattern, q.device)
    statistics = _statistics(grad, grad_lse, out, lse, scale)
    grads = _like(q, q.shape[1]), _like(k, k.shape[1]), _like(v, v.shape[1])
    numbers = {"query_heads": q.shape[1], "group": q.shape[1] // k.shape[1], "scale2": scale * LOG2_E, "padded": 32 * statistics.shape[2]}
    for name, factor, seen, tensors in (
        ("volta_grad_q", scale, by_query, (q, grad, k, v, grads[0])),
        ("volta_grad_k", scale, by_key, (k, v, q, grad, grads[1])),
        ("volta_grad_v", 1.0, by_key, (k, v, q, grad, grads[2])),
    ):
        views = dict(zip(("x", "y", "c", "d", "out"), tensors))
        _launch(_prepare(name, views, seen, numbers | {"after": factor}, statistics=statistics))
    return grads


def _statistics(grad: Tensor, grad_lse: Tensor, out: Tensor, lse: Tensor, scale: float) -> Tensor:
    """What the gradients' kernels read per query, [B,H,S/32,2,32]: see args.cuh."""
    scores = torch.where(lse == -math.inf, -math.inf, -lse / scale)
    slopes = grad_lse - (grad.float() * out.float()).sum(-1)
    extra = -lse.shape[2] % PADDING
    rows = [F.pad(scores, (0, extra), value=-math.inf), F.pad(slopes, (0, extra))]
    return torch.stack([row.unflatten(-1, (-1, 32)) for row in rows], -2)


@_backward.register_fake
def _(grad: Tensor, grad_lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _like(q, q.shape[1]), _like(k, k.shape[1]), _like(v, v.shape[1])


def _keep(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    q, k, v, *rest = inputs
    ctx.save_for_backward(q, k, v, *output)
    ctx.rest = rest[:-1]


def _gradients(ctx: Any, grad: Tensor, grad_lse: Tensor) -> tuple:
    q, k, v, out, lse = ctx.saved_tensors
    return *_backward(grad, grad_lse, q, k, v, out, lse, *ctx.rest), *(None for _ in ctx.rest), None


_forward.register_autograd(_gradients, setup_context=_keep)
