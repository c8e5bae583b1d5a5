"""The exchange of tokens between ranks and the products of experts beside it, as one operator of torch_npu each, with gradients.

npu_alltoallv_gmm sends rows to their experts and multiplies what arrives, npu_gmm_alltoallv multiplies rows and sends the products back;
each is the other's backward. torch_npu gives them no gradients, so these are ours. Not run on hardware; see docs/npu-checks.md.

Shapes: n rows of this rank, sorted by expert; M rows that arrive here, sorted by expert held here, then by the rank that sent them;
e experts held here, D and F widths.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from llmtrain.compat import hccl_name
from llmtrain.ops.npu import gateway
from llmtrain.ops.npu.experts import BY_SUM, grouped_product
from llmtrain.parallel.hang.where import count, device_wait, recorded


@dataclass(frozen=True)
class Exchange:
    """How many rows go where: `sent` by rank and then by expert held there, `arriving` by rank and then by expert held here."""

    group: dist.ProcessGroup
    sent: list[int]
    arriving: list[int]
    counts: Tensor
    """[e] int64, rows of each expert held here; they sum to M."""
    grouped_mm: Callable[[Tensor, Tensor, Tensor], Tensor]
    """The op of that name."""

    @classmethod
    def of(cls, counts: Tensor, group: dist.ProcessGroup, grouped_mm: Callable[[Tensor, Tensor, Tensor], Tensor]) -> "Exchange":
        """From this rank's rows for each of all experts [E]; the ranks tell each other, and the host waits for it."""
        received = torch.empty_like(counts)
        with recorded("all_to_all", group):
            dist.all_to_all_single(received, counts, group=group)
        with device_wait():
            sent, arriving = torch.stack((counts, received)).tolist()
        return cls(group, sent, arriving, received.view(group.size(), -1).sum(0), grouped_mm)

    def send_and_multiply(self, rows: Tensor, weight: Tensor, *, transposed: bool, keep: bool) -> tuple[Tensor, Tensor | None]:
        """rows [n,D], weight [e,D,F], or [e,F,D] if `transposed` -> [M,F], and the rows as they arrived [M,D] if `keep`."""
        count("all_to_all", self.group)
        product, _, arrived = gateway.fused("npu_alltoallv_gmm")(
            rows.contiguous(),
            weight.contiguous(),
            hccl_name(self.group),
            self.group.size(),
            self.sent,
            self.arriving,
            trans_gmm_weight=transposed,
            permute_out_flag=keep,
        )
        return product, arrived if keep else None

    def multiply_and_return(self, rows: Tensor, weight: Tensor, *, transposed: bool) -> Tensor:
        """rows [M,F], weight [e,F,D], or [e,D,F] if `transposed` -> [n,D] in the order in which this rank sent its rows."""
        count("all_to_all", self.group)
        product, _ = gateway.fused("npu_gmm_alltoallv")(
            rows.contiguous(),
            weight.contiguous(),
            hccl_name(self.group),
            self.group.size(),
            self.arriving,  # what arrived goes back
            self.sent,
            trans_gmm_weight=transposed,
        )
        return product

    def weight_gradient(self, rows: Tensor, grad: Tensor) -> Tensor:
        """Per expert its rows [M,D] transposed times their gradients [M,F]: [e,D,F]."""
        if not len(rows):
            return rows.new_zeros(len(self.counts), rows.shape[1], grad.shape[1])
        if len(self.counts) == 1:  # the operator takes no single group
            return (rows.t() @ grad)[None]
        return grouped_product(rows.t(), grad.contiguous(), self.counts, BY_SUM)


def alltoallv_matmul(rows: Tensor, weights: Sequence[Tensor], exchange: Exchange) -> tuple[Tensor, ...]:
    """rows [n,D] sent to their experts, times each of `weights` [e,D,F]: [M,F] each.

    Gradients: of the rows whole, of the weights this rank's own. Raises ValueError for shapes that do not fit.
    """
    _check(rows, weights[0], exchange, sum(exchange.sent))
    return _Send.apply(exchange, rows, *weights)


def matmul_alltoallv(rows: Tensor, weight: Tensor, exchange: Exchange) -> Tensor:
    """rows [M,F] times `weight` [e,F,D] of their experts, sent back: [n,D] in the order of the rows that `alltoallv_matmul` was given.

    Gradients and errors as there.
    """
    _check(rows, weight, exchange, sum(exchange.arriving))
    return _Return.apply(exchange, rows, weight)


def _check(rows: Tensor, weight: Tensor, exchange: Exchange, expected: int) -> None:
    held = len(exchange.counts)
    fits = rows.dim() == 2 and weight.dim() == 3 and weight.shape[:2] == (held, rows.shape[1]) and len(rows) == expected
    if not fits or rows.dtype != weight.dtype:
        found = f"rows {tuple(rows.shape)} {rows.dtype}, weight {tuple(weight.shape)} {weight.dtype}"
        needed = f"[{expected},D] and [{held},D,F] of one dtype"
        raise ValueError(f"exchange of experts: {found}; needed {needed}. Or set parallel.ep_kind all_to_all")


class _Send(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, exchange: Exchange, rows: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        first, *others = weights
        needs_arrived = bool(others) or any(ctx.needs_input_grad[2:])
        product, arrived = exchange.send_and_multiply(rows, first, transposed=False, keep=needs_arrived)
        products = [product, *(exchange.grouped_mm(arrived, weight, exchange.counts) for weight in others)]
        ctx.exchange = exchange
        ctx.save_for_backward(arrived, *weights)
        return tuple(products)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        arrived, *weights = ctx.saved_tensors
        of_rows = None
        if ctx.needs_input_grad[1]:
            # A sum of products is one product of joined factors, so that rows travel once.
            grad, weight = (grads[0], weights[0]) if len(grads) == 1 else (torch.cat(grads, 1), torch.cat(weights, 2))
            of_rows = ctx.exchange.multiply_and_return(grad, weight, transposed=True)
        needed = zip(grads, ctx.needs_input_grad[2:])
        return None, of_rows, *(ctx.exchange.weight_gradient(arrived, grad) if need else None for grad, need in needed)


class _Return(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, exchange: Exchange, rows: Tensor, weight: Tensor) -> Tensor:
        ctx.exchange = exchange
        ctx.save_for_backward(rows, weight)
        return exchange.multiply_and_return(rows, weight, transposed=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, Tensor | None]:
        rows, weight = ctx.saved_tensors
        needs_weight = ctx.needs_input_grad[2]
        # The gradients of all ranks travel even if none of this rank's rows needs one.
        of_rows, arrived = ctx.exchange.send_and_multiply(grad, weight, transposed=True, keep=needs_weight)
        return None, of_rows, ctx.exchange.weight_gradient(rows, arrived) if needs_weight else None
