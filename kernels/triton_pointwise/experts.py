"""Rows of tokens sorted by expert, and back: sums over a token's copies without the copies in between."""

from typing import Any

import torch
from llmtrain_kernels.triton_pointwise.checks import check
from torch import Tensor

BLOCK = 1024


def permute(x: Tensor, order: Tensor, places: Tensor) -> Tensor:
    """Row i is x[order[i] // k]: x [N,D], order [N*k] and its inverse places [N,k] (where each copy stands), int64 -> [N*k,D].

    The gradient is the sum of a token's copies, slot by slot. Raises ValueError for other shapes.
    """
    check("permute", x)
    if x.dim() != 2 or places.dim() != 2 or len(x) != len(places) or order.shape != (places.numel(),):
        shapes = f"x {tuple(x.shape)}, order {tuple(order.shape)}, places {tuple(places.shape)}"
        raise ValueError(f"permute in Triton: {shapes}; needed [N,D], [N*k] and [N,k]")
    return permute_op(x, order, places)


def unpermute(rows: Tensor, places: Tensor, probs: Tensor) -> Tensor:
    """out[n] = sum over slots of probs[n,slot] * rows[places[n,slot]]: rows [N*k,D], places [N,k] int64, probs [N,k] -> [N,D].

    Summed in fp32, returned in rows' dtype; rows and probs are kept for the backward pass. Raises ValueError for other shapes.
    """
    check("unpermute", rows, probs)
    if rows.dim() != 2 or probs.dim() != 2 or places.shape != probs.shape or len(rows) != probs.numel():
        shapes = f"rows {tuple(rows.shape)}, places {tuple(places.shape)}, probs {tuple(probs.shape)}"
        raise ValueError(f"unpermute in Triton: {shapes}; needed [N*k,D], [N,k] and [N,k]")
    return unpermute_op(rows, places, probs)


def _sum(rows: Tensor, places: Tensor, probs: Tensor | None) -> Tensor:
    """[N*k,D] -> [N,D], weighed if there are probs [N,k]."""
    from llmtrain_kernels.triton_pointwise.programs import sum_copies

    rows, (tokens, copies), width = rows.contiguous(), places.shape, rows.shape[1]
    out = rows.new_empty(tokens, width)
    block = _block(width)
    if out.numel():
        args = (rows, places.contiguous(), rows if probs is None else probs.contiguous(), out, width, copies)
        sum_copies[(tokens * -(-width // block),)](*args, WEIGHED=probs is not None, BLOCK=block)
    return out


def _block(width: int) -> int:
    return min(BLOCK, 1 << (width - 1).bit_length())


@torch.library.custom_op("llmtrain_kernels::triton_permute", mutates_args=())
def permute_op(x: Tensor, order: Tensor, places: Tensor) -> Tensor:
    """The copies: one read and one write of each, which torch's own kernel does as well."""
    return x.index_select(0, order // places.shape[1])


@permute_op.register_fake
def _(x: Tensor, order: Tensor, places: Tensor) -> Tensor:
    return x.new_empty(len(order), x.shape[1])


@torch.library.custom_op("llmtrain_kernels::triton_permute_backward", mutates_args=())
def permute_backward_op(grad: Tensor, places: Tensor) -> Tensor:
    """The gradient of x [N,D]."""
    return _sum(grad, places, None)


@permute_backward_op.register_fake
def _(grad: Tensor, places: Tensor) -> Tensor:
    return grad.new_empty(len(places), grad.shape[1])


def _keep_places(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(inputs[2])


def _backward_permute(ctx: Any, grad: Tensor) -> tuple:
    return permute_backward_op(grad, *ctx.saved_tensors), None, None


permute_op.register_autograd(_backward_permute, setup_context=_keep_places)


@torch.library.custom_op("llmtrain_kernels::triton_unpermute", mutates_args=())
def unpermute_op(rows: Tensor, places: Tensor, probs: Tensor) -> Tensor:
    """The weighed sums [N,D]."""
    return _sum(rows, places, probs)


@unpermute_op.register_fake
def _(rows: Tensor, places: Tensor, probs: Tensor) -> Tensor:
    return rows.new_empty(len(probs), rows.shape[1])


@torch.library.custom_op("llmtrain_kernels::triton_unpermute_backward", mutates_args=())
def unpermute_backward_op(grad: Tensor, rows: Tensor, places: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of rows and of probs."""
    from llmtrain_kernels.triton_pointwise.programs import spread_copies

    grad, rows, places, probs = (x.contiguous() for x in (grad, rows, places, probs))
    grads = torch.empty_like(rows), torch.empty_like(probs)
    if rows.numel():
        args = (grad, rows, places, probs, *grads, rows.shape[1], places.shape[1])
        spread_copies[(places.numel(),)](*args, BLOCK=_block(rows.shape[1]))
    return grads


@unpermute_backward_op.register_fake
def _(grad: Tensor, rows: Tensor, places: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
    return rows.new_empty(rows.shape), probs.new_empty(probs.shape)


def _keep(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward_unpermute(ctx: Any, grad: Tensor) -> tuple:
    grad_rows, grad_probs = unpermute_backward_op(grad, *ctx.saved_tensors)
    return grad_rows, None, grad_probs


unpermute_op.register_autograd(_backward_unpermute, setup_context=_keep)
