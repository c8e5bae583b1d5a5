"""Ops of routed experts: one product per expert over sorted rows, and the sorting itself."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from llmtrain.ops.registry import Call, register


def _check_grouped(x: Tensor, weight: Tensor, counts: Tensor) -> list[int]:
    sizes = counts.tolist()
    if x.shape[-1] != weight.shape[1] or len(sizes) != len(weight) or sum(sizes) != len(x):
        shapes = f"x {tuple(x.shape)}, weight {tuple(weight.shape)}, counts {sizes if len(sizes) < 9 else tuple(counts.shape)}"
        raise ValueError(f"grouped_mm: {shapes}; needed [N,D], [E,D,F] and [E] with sum N")
    return sizes


@register("grouped_mm", "loop", speed=0)
def grouped_mm_loop(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """x [N,D] sorted by expert, weight [E,D,F], counts [E] int64 -> [N,F]: one matrix product per expert that has rows."""
    sizes = _check_grouped(x, weight, counts)
    return torch.cat([rows @ matrix for rows, matrix in zip(x.split(sizes), weight.unbind())])


@register("grouped_mm", "padded", speed=-1)
def grouped_mm_padded(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """One batched product over experts padded to the fullest: memory grows with the imbalance, so `auto` never takes it."""
    sizes = _check_grouped(x, weight, counts)
    if not len(x):
        return grouped_mm_loop(x, weight, counts)
    longest = max(sizes)
    expert = torch.repeat_interleave(torch.arange(len(sizes), device=x.device), counts, output_size=len(x))
    slot = expert * longest + torch.arange(len(x), device=x.device) - (counts.cumsum(0) - counts)[expert]
    padded = x.new_zeros(len(sizes) * longest, x.shape[-1]).index_copy(0, slot, x)
    out = torch.bmm(padded.view(len(sizes), longest, -1), weight)
    return out.flatten(0, 1).index_select(0, slot)


def _supports_torch(call: Call) -> str | None:
    if call.device == "cuda" and (call.dtype != torch.bfloat16 or (call.capability or (0, 0)) < (8, 0)):
        return "needs bfloat16 and compute capability 8.0 on cuda"
    uneven = [width for width in call.expert_widths if width * call.dtype.itemsize % 16]
    return f"needs widths of a multiple of 16 bytes, {uneven[0]} elements are {uneven[0] * call.dtype.itemsize} bytes" if uneven else None


def _probe_torch() -> str | None:
    return None if hasattr(F, "grouped_mm") else f"torch.nn.functional.grouped_mm is not in torch {torch.__version__}"


@register(
    "grouped_mm",
    "torch",
    devices=("cpu", "cuda"),
    dtypes=(torch.float32, torch.bfloat16, torch.float16),
    speed=1,
    probe=_probe_torch,
    supports=_supports_torch,
)
def grouped_mm_torch(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """torch.nn.functional.grouped_mm; it reads the counts on the device, without waiting for them."""
    out = F.grouped_mm(x, weight, offs=counts.cumsum(0, dtype=torch.int32))
    if out.requires_grad:
        out.register_hook(Tensor.contiguous)  # its backward refuses expanded gradients, such as those of sum()
    return out


@register("permute", "reference", speed=0)
def permute_reference(x: Tensor, ids: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Copy each row of x [N,D] once per expert in ids [N,k] and sort by expert, ties by token.

    Returns rows [N*k,D], order [N*k] (rows[i] is copy order[i] = token * k + slot) and counts [experts] int64. The gradient sums the
    copies of a token slot by slot, so it is deterministic.
    """
    order, counts = sort_by_expert(ids, experts)
    return _Copies.apply(x, order, ids.shape[1]), order, counts


def sort_by_expert(ids: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """order [N*k] and counts [experts] of `permute` for ids [N,k]."""
    flat = ids.reshape(-1)
    return flat.argsort(stable=True), torch.bincount(flat, minlength=experts)


@register("unpermute", "reference", speed=0)
def unpermute_reference(rows: Tensor, order: Tensor, probs: Tensor) -> Tensor:
    """Undo `permute`: out[n] = sum over slots of probs[n, slot] * its row; rows [N*k,D], probs [N,k] -> [N,D] in rows' dtype.

    Summed in the wider dtype of rows and probs.
    """
    copies = rows.index_select(0, inverse(order)).view(*probs.shape, -1)  # [N,k,D]
    return _WeightedSum.apply(copies, probs)


def inverse(order: Tensor) -> Tensor:
    """The permutation that undoes `order` [N]."""
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))


class _Copies(torch.autograd.Function):
    """x[order // k], with a gradient that gathers and sums instead of adding rows in an order that a device may vary."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, copies: int) -> Tensor:
        ctx.save_for_backward(order)
        ctx.copies = copies
        return x.index_select(0, order // copies)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (order,) = ctx.saved_tensors
        back = grad.index_select(0, inverse(order))
        return back.view(-1, ctx.copies, grad.shape[-1]).sum(1), None, None


class _WeightedSum(torch.autograd.Function):
    """Sum over k of probs [N,k] * rows [N,k,D] -> [N,D] in rows' dtype, as a product: one pass, in half the time of a multiplication and a
    sum. Kept for the backward pass are the rows in their own dtype, not in the wider one in which they are summed."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, probs: Tensor) -> Tensor:
        ctx.save_for_backward(rows, probs)
        wide = torch.promote_types(rows.dtype, probs.dtype)
        return torch.bmm(probs.to(wide).unsqueeze(1), rows.to(wide)).squeeze(1).to(rows.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        rows, probs = ctx.saved_tensors
        wide = torch.promote_types(rows.dtype, probs.dtype)
        each = grad.to(wide).unsqueeze(1)  # [N,1,D]
        of_probs = torch.bmm(rows.to(wide), each.transpose(1, 2)).squeeze(2)
        return torch.bmm(probs.to(wide).unsqueeze(2), each).to(rows.dtype), of_probs.to(probs.dtype)
