"""Projections beside collectives of tensor parallelism, with their adapters if they have any.

What an adapter adds is narrow in its middle. Where a projection is split by columns, B is split with it and A is whole on every rank: its
product comes out of the same gathering as the projection's. Where it is split by rows, so is A, and its partial products, `rank` numbers
a token, are summed and scattered; B is whole. The gradients of what is whole are partial sums on each rank, as those of all that tp does
not split.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from llmtrain.model.lora import AdaptedLinear
from llmtrain.parallel.fsdp import local_tensor
from llmtrain.parallel.ops import all_gather_matmul, matmul_reduce_scatter


def gather_matmul(x: Tensor, projections: Sequence[nn.Linear], *, rows: Sequence[slice | None] | None = None, **fused: Any) -> list[Tensor]:
    """x [B,S/t,D] of every rank through this rank's columns of each projection: a list of [B,S,F/t], or rows as all_gather_matmul says.

    `rows` are those of a projection that this rank computes of what it holds of it; all if None.
    """
    rows = rows or [None] * len(projections)
    weights, biases = ([own_rows(getattr(proj, name), own) for proj, own in zip(projections, rows)] for name in ("weight", "bias"))
    adapted = [index for index, proj in enumerate(projections) if isinstance(proj, AdaptedLinear)]
    narrow = [local_tensor(projections[index].lora_a) for index in adapted]
    products = all_gather_matmul(x, [*weights, *narrow], [*biases, *[None] * len(narrow)], **fused)
    found = products[: len(projections)]
    for index, product in zip(adapted, products[len(projections) :]):
        proj = projections[index]
        found[index] = found[index] + F.linear(product * proj.scale, own_rows(proj.lora_b, rows[index]))
    return found


def matmul_scatter(x: Tensor, proj: nn.Linear, **fused: Any) -> Tensor:
    """x [B,S,F/t], this rank's, through its rows of the projection, summed over ranks: [B,S/t,D], without the bias."""
    out = matmul_reduce_scatter(x, local_tensor(proj.weight), **fused)
    if not isinstance(proj, AdaptedLinear):
        return out
    narrow = matmul_reduce_scatter(x, local_tensor(proj.lora_a), **fused)
    return out + F.linear(narrow * proj.scale, local_tensor(proj.lora_b))


def own_rows(parameter: Tensor | None, rows: slice | None) -> Tensor | None:
    """This rank's part of a parameter, or of that the rows `rows`; None of None."""
    local = local_tensor(parameter)
    return local if local is None or rows is None else local[rows]
