"""Embedding and logits over a vocabulary of which each rank holds a range: ceil(V/t) entries, the last ranks what is left."""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from llmtrain.parallel.ops.pending import start_gather
from llmtrain.parallel.ops.sequence import reduce_scatter_sequence


def first_entry(vocab_size: int, group: dist.ProcessGroup) -> int:
    """The first entry of this rank's range of the vocabulary, as DTensor's Shard(0) has it."""
    return min(vocab_size, -(-vocab_size // group.size()) * group.rank())


def vocab_embedding(tokens: Tensor, weight: Tensor, *, vocab_size: int, group: dist.ProcessGroup) -> Tensor:
    """tokens [B,S] -> embeddings [B,S/t,D] of this rank's part of the sequence; `weight` is this rank's range of the table."""
    local = tokens - first_entry(vocab_size, group)
    elsewhere = (local < 0) | (local >= weight.shape[0])
    found = F.embedding(local.masked_fill(elsewhere, 0), weight).masked_fill(elsewhere[..., None], 0.0)
    return reduce_scatter_sequence(found, group)


def gather_vocabulary(logits: Tensor, *, vocab_size: int, group: dist.ProcessGroup) -> Tensor:
    """Logits [B,S,V/t] over each rank's range -> [B,S,V] on all ranks; backward, each rank takes its range of its own gradient."""
    return _GatherVocabulary.apply(logits, vocab_size, group)


class _GatherVocabulary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, vocab_size: int, group: dist.ProcessGroup) -> Tensor:
        first, width = first_entry(vocab_size, group), logits.shape[-1]
        ctx.range = slice(first, first + width)
        padded = F.pad(logits, (0, -(-vocab_size // group.size()) - width)).flatten(0, -2)
        whole = start_gather(padded, group).wait().unflatten(0, (group.size(), -1))  # [t,N,ceil(V/t)]
        return whole.transpose(0, 1).flatten(1)[:, :vocab_size].unflatten(0, logits.shape[:-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad[..., ctx.range], None, None
