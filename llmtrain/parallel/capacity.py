"""Which tokens an expert has no room for, where ranks of cp or tp hold parts of the sequences that compete for it.

Every rank gathers the choices of the whole sequences and decides alike, in the order of positions in the sequences. So a mesh drops what
one process does.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llmtrain.layout.sequence import Documents
from llmtrain.model.moe import MoE
from llmtrain.parallel.blocks import all_blocks
from llmtrain.parallel.cp import ContextParallel
from llmtrain.parallel.ops.pending import start_gather


def apply_capacity(model: nn.Module, *, tp_group: dist.ProcessGroup, cp: ContextParallel | None) -> None:
    """Let every mixture of experts of `model` that has a capacity decide over whole sequences, in place.

    Nothing changes where ranks hold them whole. Of padding, that of cp takes no room, that at the end of a row for tp alone does.
    """
    if cp is None and tp_group.size() == 1:
        return
    for block in all_blocks(model):
        layer = getattr(block, "ffn", None)
        if isinstance(layer, MoE) and layer.capacity is not None:
            layer.admit = whole = WholeSequences(layer.admit, layer.count, tp_group=tp_group, cp=cp)
            if cp is not None:
                block.forward = partial(_noting_documents, whole, block.forward)


def _noting_documents(whole: "WholeSequences", forward: Callable[..., Tensor], x: Tensor, *, mask: Any, **others: Any) -> Tensor:
    """A block's forward pass, or its recomputation, for rows of the documents of `mask`."""
    whole.documents = mask.documents
    return forward(x, mask=mask, **others)


class WholeSequences:
    """In the place of `MoE.admit`: probs and ids [N,k] of this rank's parts of `rows` sequences, [B,S/(cp t)] tokens."""

    def __init__(self, decide: Callable[..., Tensor], experts: int, *, tp_group: dist.ProcessGroup, cp: ContextParallel | None):
        self.decide, self.experts, self.tp_group, self.cp = decide, experts, tp_group, cp
        self.documents: Documents | None = None
        """Of the rows that the block computes now; they say which positions a rank of cp holds."""

    def __call__(self, probs: Tensor, ids: Tensor, *, rows: int) -> Tensor:
        local = torch.cat((probs, ids.to(probs.dtype)), 1).view(rows, -1, 2 * ids.shape[1])  # fp32 holds both
        whole = self._whole(local)  # [B,S,2k]
        probs, ids = whole.flatten(0, 1).chunk(2, dim=1)
        return self._local(self.decide(probs, ids.to(torch.int64), rows=rows).view(rows, whole.shape[1], -1)).flatten(0, 1)

    def _whole(self, local: Tensor) -> Tensor:
        """[B,S/(cp t),...] -> [B,S,...]"""
        if self.tp_group.size() > 1:
            local = start_gather(local.transpose(0, 1), self.tp_group).wait().transpose(0, 1)
        return local if self.cp is None else self.cp.join(local, self.documents, sum(self.documents[0]))

    def _local(self, whole: Tensor) -> Tensor:
        """The inverse of `_whole`; padding goes to no expert."""
        if self.cp is not None:
            whole = self.cp.split_tensor(whole, self.documents, self.experts)
        return whole.chunk(self.tp_group.size(), dim=1)[self.tp_group.rank()]
