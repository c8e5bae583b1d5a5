"""Matrices of adapters beside the weights of a model, by name, and the sum of both."""

from collections.abc import Collection, Iterable, Iterator

import torch
from torch import Tensor

A, B = "lora_a", "lora_b"
"""What comes after a projection's name: `blocks.0.attention.q_proj.lora_a` [rank,inputs] and `lora_b` [outputs,rank]."""


def is_adapter(name: str) -> bool:
    """Whether the parameter of this canonical name is a matrix of an adapter."""
    return name.endswith((f".{A}", f".{B}"))


@torch.no_grad()
def added(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """weight [outputs,inputs] + scale B A, summed in fp32 or wider and stored as the weight is."""
    high = torch.promote_types(weight.dtype, torch.float32)
    a, b = (matrix.to(weight.device, high) for matrix in (a, b))
    return (weight.to(high) + scale * (b @ a)).to(weight.dtype)


def merged(tensors: Iterable[tuple[str, Tensor]], adapted: Collection[str], scale: float) -> Iterator[tuple[str, Tensor]]:
    """(canonical name, whole tensor) of the model that computes what `tensors` do with the adapters of the projections `adapted`.

    A projection waits for its adapter: one at a time where the matrices come together.
    """
    waiting: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors:
        projection, _, kind = name.rpartition(".")
        if projection not in adapted or kind not in ("weight", A, B):
            yield name, tensor
            continue
        parts = waiting.setdefault(projection, {})
        parts[kind] = tensor
        if len(parts) == 3:
            yield f"{projection}.weight", added(parts["weight"], parts[A], parts[B], scale)
            del waiting[projection]
