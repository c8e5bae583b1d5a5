"""Canonical state of a model that DeepSpeed has in flat pieces, both ways, one tensor at a time and bit for bit."""

from collections.abc import Iterator
from itertools import product

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from llmtrain.compat import dtensor_as_is
from llmtrain.engine.deepspeed_layout import Piece, Replicated
from llmtrain.parallel.fsdp import local_tensor
from llmtrain.parallel.hang.where import recorded
from llmtrain.parallel.mesh import Mesh

KINDS = ("weight", "exp_avg", "exp_avg_sq")
PLACEMENTS = Replicate(), Shard(0), Replicate()
"""Over the axes of `Mesh.dense`: a rank of dp_shard has as many rows of each tensor as under FSDP."""


class CanonicalState:
    """Copies of weights and moments in global coordinates: what is whole for a moment is cut by rows over the ranks of dp_shard.

    shapes: of the parameters before DeepSpeed took them.
    """

    def __init__(self, layout: Replicated, shapes: dict[str, torch.Size], *, moments: dict[Tensor, dict], mesh: Mesh):
        self.layout, self.shapes, self._moments, self.mesh = layout, shapes, moments, mesh

    def _parts(self, *, changed: bool = False) -> Iterator[tuple[str, str, Piece, Tensor]]:
        """(name, kind, piece, this rank's elements, to be `changed` or read) of every tensor, in the same order on every rank."""
        for owner, names in self.layout.groups():
            with self.layout.held(owner, changed=changed):
                for name, kind in product(names, KINDS):
                    piece = self.layout.pieces[name]
                    yield name, kind, piece, piece.of(piece.owner if kind == "weight" else self._moments[piece.owner][kind])

    @torch.no_grad()
    def read(self) -> dict[str, Tensor]:
        """The state, copied. Weights are on the device, moments on the host."""
        return {f"{name}.{kind}": self._shared(self._whole(name, piece, mine), kind) for name, kind, piece, mine in self._parts()}

    def _whole(self, name: str, piece: Piece, mine: Tensor) -> Tensor:
        device, shape = self.mesh.device.torch_device, self.shapes[name]
        if piece.count == shape.numel() and self.layout.holders is None:
            return mine.to(device).view(shape)
        # As whole numbers, to which the zeros of the other ranks add nothing, not even to the sign of a zero.
        bits = torch.zeros(shape.numel(), dtype=torch.int32, device=device)
        bits[piece.at : piece.at + piece.count] = mine.view(torch.int32).to(device)
        if self.mesh.world > 1:
            with recorded("all_reduce", "world"):
                dist.all_reduce(bits)
        return bits.view(torch.float32).view(shape)

    def _shared(self, whole: Tensor, kind: str) -> Tensor:
        keep = whole.device if kind == "weight" else torch.device("cpu")
        if self.mesh.world == 1:
            return whole.to(keep, copy=True)
        rows = whole.chunk(self.mesh.fsdp.size())
        place = self.mesh.fsdp.get_local_rank()
        mine = (rows[place] if place < len(rows) else whole[:0]).to(keep, copy=True)
        return dtensor_as_is(mine, self.mesh.dense, PLACEMENTS, shape=whole.shape, stride=whole.stride())

    @torch.no_grad()
    def write(self, state: dict[str, Tensor]) -> None:
        """Take weights and moments from a canonical state, however it is sharded."""
        for name, kind, piece, mine in self._parts(changed=True):
            key = f"{name}.{kind}"
            if key in state:
                mine.copy_(_full(state[key], self.mesh).reshape(-1)[piece.at : piece.at + piece.count])
        self.layout.refresh()


def _full(tensor: Tensor, mesh: Mesh) -> Tensor:
    """All of a tensor, which may be a DTensor whose parts are on the host."""
    if not isinstance(tensor, DTensor):
        return tensor
    local, over = local_tensor(tensor).to(mesh.device.torch_device), tensor.device_mesh
    with recorded("all_gather", "world"):
        return dtensor_as_is(local, over, tensor.placements, shape=tensor.shape, stride=tensor.stride()).full_tensor()
