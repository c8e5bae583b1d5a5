"""Gradients of one step, put together: sums over ranks that FSDP2 does not make, and the global norm."""

import math
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from llmtrain.parallel.hang.where import device_wait, recorded

SPLIT_BY_TP = ("tp", "ep", "etp")
"""Axes of a parameter's mesh whose ranks compute its whole gradient: every other parameter's is a partial sum on each rank of tp."""
PIECE = 2**18
"""Elements of a gradient that a norm adds up at once on the CPU, which adds floats in turn: 16.8 M of them come out 7e-4 too small."""


def partial_over_tp(parameter: nn.Parameter) -> bool:
    """Whether each rank of tp has only a part of this (not yet FSDP-sharded) parameter's gradient."""
    return not (isinstance(parameter, DTensor) and any(axis in SPLIT_BY_TP for axis in parameter.device_mesh.mesh_dim_names))


@torch.no_grad()
def sum_gradients(gradients: Iterable[Tensor], group: dist.ProcessGroup) -> None:
    """Sum local gradients over `group`, in place: one collective per dtype, whatever their number."""
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for gradient in gradients:
        by_dtype.setdefault(gradient.dtype, []).append(gradient)
    for same in by_dtype.values():
        flat = torch.cat([gradient.flatten() for gradient in same])
        with recorded("all_reduce", group):
            dist.all_reduce(flat, group=group)
        for gradient, total in zip(same, flat.split([gradient.numel() for gradient in same])):
            gradient.copy_(total.view_as(gradient))


def holders(parameter: Tensor, ranks: int) -> int:
    """How many of the `ranks` ranks of a pipeline stage hold the same part of `parameter`."""
    if not isinstance(parameter, DTensor):
        return ranks
    mesh = parameter.device_mesh
    split = math.prod(mesh.size(axis) for axis, placement in enumerate(parameter.placements) if not placement.is_replicate())
    return ranks // split


def square_sum(gradients: Sequence[Tensor], held_by: Sequence[int]) -> float:
    """This rank's share of the squared norm: gradients that `held_by[i]` ranks hold count for one."""
    total = 0.0
    for count in sorted(set(held_by)):
        norm = torch.nn.utils.get_total_norm([piece for g, n in zip(gradients, held_by) if n == count for piece in _pieces(g)])
        with device_wait():
            total += norm.item() ** 2 / count
    return total


def _pieces(gradient: Tensor) -> Sequence[Tensor]:
    return gradient.reshape(-1).split(PIECE) if gradient.device.type == "cpu" else [gradient]
