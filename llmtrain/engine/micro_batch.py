"""One micro-batch as the stages of a rank see it: what all of them share is made once."""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmtrain.data.batch import NO_TARGET, Batch
from llmtrain.data.shifted import shifted
from llmtrain.device.base import Device
from llmtrain.ops import Mask
from llmtrain.parallel.cp import ContextParallel


@dataclass
class MicroBatch:
    """This rank's part of a batch on its device, with the mask and the rotation that every stage and block of the rank reuses."""

    tokens: Tensor
    targets: Tensor
    positions: Tensor
    mask: Mask
    ahead: tuple[tuple[Tensor, Tensor], ...] = ()
    """Tokens and targets of each head of multi-token prediction."""
    _rope: tuple | None = field(default=None, repr=False)

    def rope(self, model: nn.Module, dtype: torch.dtype):
        """RoPE's (cos, sin) for these positions, computed for the first stage that asks."""
        if self._rope is None and hasattr(model, "rotation"):
            self._rope = (model.rotation(self.positions, dtype),)
        return None if self._rope is None else self._rope[0]


def prepare(batch: Batch, *, device: Device, cp: ContextParallel | None, multiple: int, heads: int = 0) -> MicroBatch:
    """The part of `batch` [B,S] that this rank of cp computes; its length is a multiple of `multiple` (tp cuts the sequence).

    `heads` is the number of heads of multi-token prediction, which look ahead in the whole rows.
    """
    if batch.tokens.shape[1] % multiple and cp is None:
        batch = pad(batch, -(-batch.tokens.shape[1] // multiple) * multiple)
    ahead = tuple(shifted(batch, by) for by in range(1, heads + 1))
    if cp is not None:
        fills = 0, NO_TARGET
        ahead = tuple(tuple(cp.split_tensor(t, batch.documents, fill) for t, fill in zip(pair, fills)) for pair in ahead)
        batch = cp.split(batch)
    batch, place = batch.to(device.torch_device), device.torch_device
    ahead = tuple((tokens.to(place), targets.to(place)) for tokens, targets in ahead)
    return MicroBatch(batch.tokens, batch.targets, batch.positions, Mask(documents=batch.documents), ahead)


def pad(batch: Batch, length: int) -> Batch:
    """`batch` with tokens that nothing sees and that have no target, up to `length` tokens a row."""
    extra = length - batch.tokens.shape[1]
    rows = batch.documents if batch.documents is not None else ((batch.tokens.shape[1],),) * len(batch)
    return replace(
        batch,
        tokens=F.pad(batch.tokens, (0, extra)),
        targets=F.pad(batch.targets, (0, extra), value=NO_TARGET),
        positions=F.pad(batch.positions, (0, extra)),
        documents=tuple((*lengths, extra) for lengths in rows),
    )
