"""FastAttention (arXiv 2410.16663) in plain PyTorch: the specification that the kernels are tested against. Clear rather than fast.

Two levels of tiles. A large tile of scores is what Cube hands to Vector under one flag; it is computed as small tiles that fit the buffers
on the chip. Vector walks its rows in strips with the online softmax. The backward pass recomputes the weights from the log-sum-exp. No more
than one large tile of scores exists at a time, and of the mask only the template.
"""

from dataclasses import dataclass
from typing import Any

import torch
from llmtrain_kernels.contract import check_attention
from llmtrain_kernels.mask import Mask
from llmtrain_kernels.tiling import Schedule, Tiling, slice_of
from llmtrain_kernels.tiling_backward import gradients
from llmtrain_kernels.tiling_counts import Counts
from llmtrain_kernels.tiling_forward import outputs
from llmtrain_kernels.tiling_mask import TilingMask
from llmtrain_kernels.tiling_walk import Walk
from torch import Tensor


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
    tiling: Tiling | None = None,
    counts: Counts | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention, tile by tile, in fp32 (fp64 for fp64).

    q [B,H,S,d], k [B,K,T,d], v [B,K,T,dv]; `scale` is 1/sqrt(d) by default. Returns out [B,H,S,dv] in q's dtype and, if asked, lse
    [B,H,S] in the computing dtype, both with gradients, but no second ones. Query i stands at position q_offset + i, key j at
    kv_offset + j. A query that sees no key has an output of zeros and a log-sum-exp of minus infinity. `counts` is added to, forward
    and backward. Raises ValueError for shapes, offsets or a mask that do not fit.
    """
    check_attention(q, k, v, mask, q_offset=q_offset, kv_offset=kv_offset)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out, lse = _Attention.apply(q, k, v, _Call(mask, scale, q_offset, kv_offset, tiling or Tiling(), counts or Counts()))
    return (out, lse) if return_lse else out


@dataclass
class _Call:
    """What a call says beside its tensors."""

    mask: Mask
    scale: float
    q_offset: int
    kv_offset: int
    tiling: Tiling
    counts: Counts

    def walks(self, q: Tensor, k: Tensor) -> list[tuple[list[int], Walk]]:
        """Batch rows with the same documents, and how their tiles are walked."""
        layouts: dict[Any, list[int]] = {}
        for row in range(q.shape[0]):
            layouts.setdefault(self.mask.documents and self.mask.documents[row], []).append(row)
        template = TilingMask(self.tiling.edge, q.device)
        sizes = {"queries": q.shape[2], "keys": k.shape[2], "q_offset": self.q_offset, "kv_offset": self.kv_offset}
        schedules = [(rows, Schedule(self.mask, batch_row=rows[0], **sizes)) for rows in layouts.values()]
        high = torch.promote_types(q.dtype, torch.float32)
        return [
            (rows, Walk(schedule, self.tiling, template, self.counts, times=len(rows) * q.shape[1], scale=self.scale, high=high))
            for rows, schedule in schedules
        ]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, call: _Call) -> tuple[Tensor, Tensor]:
        out = q.new_empty(*q.shape[:3], v.shape[3])
        lse = q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
        for rows, walk in call.walks(q, k):
            for places, values, totals in outputs(walk, *(_grouped(x[rows], k.shape[1]) for x in (q, k, v))):
                out[rows, :, slice_of(places)] = values.flatten(1, 2).to(q.dtype)
                lse[rows, :, slice_of(places)] = totals.flatten(1, 2)
        ctx.call = call
        ctx.save_for_backward(q, k, v, out, lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("the tiled attention has no second derivative")
        q, k, v, out, lse = ctx.saved_tensors
        # What the softmax takes from the slope of each score of a query. The gradient of lse gives each score its weight.
        delta = (grad.to(lse.dtype) * out).sum(-1) - grad_lse
        grads = [torch.empty_like(x) for x in (q, k, v)]
        for rows, walk in ctx.call.walks(q, k):
            parts = [_grouped(x[rows], k.shape[1]) for x in (q, k, v, grad, lse.unsqueeze(-1), delta.unsqueeze(-1))]
            for whole, part in zip(grads, gradients(walk, *parts)):
                whole[rows] = part.flatten(1, 2).to(whole.dtype)
        return *grads, None


def _grouped(x: Tensor, kv_heads: int) -> Tensor:
    """[B,H,..] -> [B,K,H/K,..] and [B,K,..] -> [B,K,1,..]: query heads that share keys get a dim of their own."""
    return x.unflatten(1, (kv_heads, -1))
