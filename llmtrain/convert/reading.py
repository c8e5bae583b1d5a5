"""Parameters out of the tensors of a Hugging Face folder: whole, or the part of them that a rank holds."""

from collections.abc import Sequence

import torch
from torch import Tensor

from llmtrain.convert.names import Counterpart
from llmtrain.convert.placed import fill, held, local_part
from llmtrain.convert.stored import StoredTensors

Place = Sequence[Sequence[int]]
"""Global indices along each dim, sorted."""


def read_whole(stored: StoredTensors, place: Counterpart) -> Tensor:
    """The parameter on the CPU, in the stored format."""
    if place.stack:
        whole = None
        for index, name in enumerate(place.names):
            matrix = stored.whole(name).t()
            whole = matrix.new_empty(len(place.names), *matrix.shape) if whole is None else whole
            whole[index] = matrix
        return whole
    tensor = stored.whole(place.names[0])
    return tensor if place.rows is None else tensor[torch.tensor(place.rows)]


def read_into(target: Tensor, stored: StoredTensors, place: Counterpart) -> None:
    """Fill `target`, a plain tensor or a DTensor, reading only what this rank holds: of a stack, matrix by matrix, those it holds."""
    indices = held(target)
    if not all(indices):
        return
    if not place.stack:
        fill(target, _box(stored, place, indices), indices)
        return
    experts, *inner = indices
    for slot, expert in enumerate(experts):
        matrix = stored.part(place.names[expert], [_range(part) for part in reversed(inner)]).t()
        fill(local_part(target)[slot], matrix, inner)


def _box(stored: StoredTensors, place: Counterpart, indices: Place) -> Tensor:
    """The smallest block that holds the indices; exactly those along the first dim where rows stand in another order."""
    name = place.names[0]
    if place.rows is None:
        return stored.part(name, [_range(part) for part in indices])
    rows = torch.tensor([place.rows[row] for row in indices[0]])
    first, last = int(rows.min()), int(rows.max()) + 1
    return stored.part(name, [(first, last), *(_range(part) for part in indices[1:])])[rows - first]


def _range(indices: Sequence[int]) -> tuple[int, int]:
    return indices[0], indices[-1] + 1
