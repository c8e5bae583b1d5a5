"""Ops of routed experts: products of sorted rows with the matrices of their experts, and the sorting."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from llmtrain.ops.experts import inverse
from llmtrain.ops.npu import gateway
from llmtrain.ops.npu.gateway import DTYPES, NAME, SPEED, needs, reject
from llmtrain.ops.registry import Call, register

WIDEST = 65535
"""Largest last dim of a matrix in a grouped product."""

BY_ROWS, BY_SUM = 0, 2
"""group_type of npu_grouped_matmul: the groups split the rows of the result, or the dim that is summed over."""

MOST_EXPERTS_PER_TOKEN = 512
MOST_COPIES = 16777214
"""Copies of tokens in one permutation: the operator sorts their numbers as fp32."""


def _supports_grouped(call: Call) -> str | None:
    wide = [width for width in call.expert_widths if width > WIDEST]
    return f"takes widths up to {WIDEST}, not {wide[0]}" if wide else None


@register("grouped_mm", NAME, devices=("npu",), dtypes=DTYPES, speed=SPEED, probe=needs("npu_grouped_matmul"), supports=_supports_grouped)
def grouped_mm_npu(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """npu_grouped_matmul over experts, with a gradient of our own, since the operator has none. Counts stay on the device.

    Their sum is not compared with N, which would stall it: rows behind the last group come back undefined.
    """
    experts = len(weight)
    if x.dim() != 2 or weight.dim() != 3 or x.shape[1] != weight.shape[1] or counts.shape != (experts,) or x.dtype != weight.dtype:
        found = f"x {tuple(x.shape)} {x.dtype}, weight {tuple(weight.shape)} {weight.dtype}, counts {tuple(counts.shape)}"
        raise reject("grouped_mm", found, "[N,D], [E,D,F] of one dtype and [E]")
    if max(weight.shape[1:]) > WIDEST:
        raise reject("grouped_mm", f"weight {tuple(weight.shape)}", f"widths up to {WIDEST}")
    if experts == 1 or not len(x):  # the operator takes neither a single group nor no rows
        return x @ weight[0] if experts == 1 else _nothing(x, weight)
    return _Grouped.apply(x, weight, counts.to(torch.int64))


def _nothing(x: Tensor, weight: Tensor) -> Tensor:
    """[0,F], on the graph, so that the weight gets a gradient of zeros."""
    return (x @ weight[0]) + weight.sum() * 0


def grouped_product(x: Tensor, weight: Tensor, counts: Tensor, kind: int) -> Tensor:
    """One matrix each in, one out. Counts are sizes (group_list_type 1), not running sums, which is the operator's default."""
    return gateway.fused("npu_grouped_matmul")([x], [weight], group_list=counts, split_item=3, group_type=kind, group_list_type=1)[0]


class _Grouped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, counts)
        return grouped_product(x, weight, counts, BY_ROWS)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, counts = ctx.saved_tensors
        grad = grad.contiguous()
        # The transposed views are what the operator wants: it recognises them and copies nothing.
        grad_x = grouped_product(grad, weight.transpose(1, 2), counts, BY_ROWS) if ctx.needs_input_grad[0] else None
        grad_weight = grouped_product(x.t(), grad, counts, BY_SUM) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight, None


def check_permute(ids: Tensor) -> None:
    """Raise ValueError for what the operator would sort wrongly."""
    if ids.dim() != 2 or ids.shape[1] > MOST_EXPERTS_PER_TOKEN or ids.numel() > MOST_COPIES:
        raise reject("permute", f"ids {tuple(ids.shape)}", f"[N,k] with k up to {MOST_EXPERTS_PER_TOKEN} and N*k up to {MOST_COPIES}")


@register("permute", NAME, devices=("npu",), dtypes=DTYPES, speed=SPEED, probe=needs("npu_moe_token_permute"))
def permute_npu(x: Tensor, ids: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """npu_moe_token_permute. What it calls sorted_indices is where each copy went, the inverse of `order`."""
    check_permute(ids)
    if x.dim() != 2 or len(x) != len(ids):
        raise reject("permute", f"x {tuple(x.shape)}, ids {tuple(ids.shape)}", "[N,D] and [N,k]")
    rows, places = gateway.fused("npu_moe_token_permute")(x, ids)
    counts = ids.new_zeros(experts, dtype=torch.int64).scatter_add_(0, ids.flatten(), torch.ones_like(ids.flatten()))
    return rows, inverse(places.to(torch.int64)), counts


@register("unpermute", NAME, devices=("npu",), dtypes=DTYPES, speed=SPEED, probe=needs("npu_moe_token_unpermute"))
def unpermute_npu(rows: Tensor, order: Tensor, probs: Tensor) -> Tensor:
    """npu_moe_token_unpermute: rows weighed by probs and summed per token."""
    if rows.dim() != 2 or probs.dim() != 2 or order.shape != (len(rows),) or probs.numel() != len(rows):
        shapes = f"rows {tuple(rows.shape)}, order {tuple(order.shape)}, probs {tuple(probs.shape)}"
        raise reject("unpermute", shapes, "[N*k,D], [N*k] and [N,k]")
    return gateway.fused("npu_moe_token_unpermute")(rows, inverse(order).to(torch.int32), probs)


def gating_top_k_softmax(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """npu_moe_gating_top_k_softmax: logits [N,E] -> probs [N,k] in their dtype, ids [N,k] int64. Not used by the Router.

    Which of equally probable experts comes first is not documented, and the Router promises the lowest id on every device; nor does the
    documentation, which is about inference, promise a gradient. Here for comparison on hardware.
    """
    if logits.dim() != 2 or not 0 < k <= min(logits.shape[1], 1024):
        raise reject("gating", f"logits {tuple(logits.shape)}, k {k}", "[N,E] and 0 < k <= E, at most 1024")
    probs, ids, _ = gateway.fused("npu_moe_gating_top_k_softmax")(logits, None, k)
    return probs, ids.to(torch.int64)
