"""Ops that need a process group: collectives over the sequence, alone or overlapped with the matmul beside them, and the loss over a
sharded vocabulary."""

from llmtrain.parallel.ops.fused import all_gather_matmul, matmul_reduce_scatter
from llmtrain.parallel.ops.sequence import all_gather_sequence, reduce_scatter_sequence
from llmtrain.parallel.ops.vocab_cross_entropy import vocab_cross_entropy
from llmtrain.parallel.ops.vocabulary import gather_vocabulary, vocab_embedding

__all__ = [
    "all_gather_matmul",
    "all_gather_sequence",
    "gather_vocabulary",
    "matmul_reduce_scatter",
    "reduce_scatter_sequence",
    "vocab_cross_entropy",
    "vocab_embedding",
]
