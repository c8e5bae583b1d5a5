"""Which part of a tensor a rank holds, whatever the mesh, and how that part is filled."""

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor


def held(target: Tensor) -> list[list[int] | range]:
    """Global indices along each dim that this rank holds, sorted; the whole range where the dim is not sharded.

    Found by sharding an index vector as the tensor is, so any mesh and uneven shards are right; no communication.
    Raises ValueError for a tensor on meta or one that holds partial sums.
    """
    if target.is_meta:
        raise ValueError("a tensor on the meta device holds nothing; materialise the model before loading into it")
    if not isinstance(target, DTensor):
        return [range(size) for size in target.shape]
    if any(placement.is_partial() for placement in target.placements):
        raise ValueError(f"placements {target.placements} are partial sums, which have no elements of their own to load")
    return [_held(target, dim) for dim in range(target.ndim)]


def _held(target: DTensor, dim: int) -> list[int] | range:
    if not any(_splits(placement, dim) for placement in target.placements):
        return range(target.shape[dim])
    indices = torch.arange(target.shape[dim])
    placements = [_along_first(p) if _splits(p, dim) else Replicate() for p in target.placements]
    local = distribute_tensor(indices, target.device_mesh, placements, src_data_rank=None).to_local()
    return local.tolist()


def _splits(placement: Placement, dim: int) -> bool:
    """Whether it shards `dim`; the strided shards of FSDP over tensor parallelism do not count as `is_shard`."""
    return getattr(placement, "dim", None) == dim


def _along_first(placement: Placement) -> Placement:
    """The same sharding of a vector. Strided shards keep their split."""
    if placement.dim == 0:
        return placement
    return Shard(0) if placement.is_shard() else type(placement)(0, split_factor=placement.split_factor)


def fill(target: Tensor, box: Tensor, place: list[list[int] | range]) -> None:
    """Copy into this rank's part of `target`, which holds the indices `place`, from `box`: the smallest block with all of them."""
    for dim, indices in enumerate(place):
        if box.shape[dim] != len(indices):
            box = box.index_select(dim, torch.tensor(indices) - indices[0])
    local_part(target).copy_(box)


def local_part(target: Tensor) -> Tensor:
    """What this rank holds of `target`."""
    return target.to_local() if isinstance(target, DTensor) else target
