"""How a collective and the matmul beside it are carried out together.

An implementation works on rows (llmtrain.parallel.ops.pieces) and knows nothing of gradients. Its methods are what fused kernels offer:
`gather_mm` is npu_all_gather_base_mm (llmtrain.parallel.ops.npu) or symm_mem.fused_all_gather_matmul, `start_mm_scatter` is
npu_mm_reduce_scatter_base or symm_mem.fused_matmul_reduce_scatter.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from llmtrain.compat import load_symmetric_memory
from llmtrain.parallel.hang.where import count
from llmtrain.parallel.ops.pending import Pending, start_gather, start_scatter_sum
from llmtrain.parallel.ops.pieces import Pieces

Products = tuple[list[Tensor], Tensor | None]


@dataclass(frozen=True)
class Demand:
    """What a model asks of an implementation; None where it is not known yet, and not judged."""

    device: str
    """cpu, cuda or npu."""
    ranks: int
    sums: tuple[int, ...] = ()
    """Lengths that products sum over, forward and backward."""
    dtype: torch.dtype | None = None
    hardware: str | None = None
    """Key of llmtrain.hardware."""


class Chunked:
    """Matmuls and collectives of c10d in turn over the pieces, each collective while another piece is multiplied; runs anywhere.

    One piece is the plain version: first the one, then the other.
    """

    def __init__(self, pieces: Pieces, group: dist.ProcessGroup):
        self.pieces, self.group = pieces, group

    @staticmethod
    def unavailable(demand: Demand) -> str | None:
        """Why it cannot serve this, or None."""
        return None

    def start_gather(self, rows: Tensor) -> Pending:
        """[n,D] of every rank -> [t*n,D] in the order of arrival."""
        whole = rows.new_empty(sum(self.pieces.whole_sizes), rows.shape[1])
        parts = zip(rows.split(self.pieces.local_sizes), whole.split(self.pieces.whole_sizes))
        return Pending(whole, [work for local, out in parts for work in start_gather(local, self.group, out=out).works])

    def gather_mm(self, rows: Tensor, matrices: Sequence[Tensor], *, keep: bool = False) -> Products:
        """Rows [n,D] of every rank times each of `matrices` [D,F]: a list of [t*n,F], and the gathered rows if `keep`."""
        whole, local = self.pieces.whole_sizes, rows.split(self.pieces.local_sizes)
        products = [rows.new_empty(sum(whole), matrix.shape[1]) for matrix in matrices]
        slabs = list(zip(*(product.split(whole) for product in products)))
        gathered = rows.new_empty(sum(whole), rows.shape[1]) if keep else None
        targets = gathered.split(whole) if keep else _in_turn(rows, whole)
        coming = start_gather(local[0], self.group, out=targets[0])
        for index, outs in enumerate(slabs):
            here = coming
            if index + 1 < len(slabs):
                coming = start_gather(local[index + 1], self.group, out=targets[index + 1])
            piece = here.wait()
            for out, matrix in zip(outs, matrices):
                torch.mm(piece, matrix, out=out)
        return products, gathered

    def start_mm_scatter(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Pending:
        """The sum over `pairs` of rows [t*n,F] times matrix [F,D], summed over ranks, this rank's [n,D] of it."""
        first, matrix = pairs[0]
        whole = self.pieces.whole_sizes
        result = first.new_empty(sum(self.pieces.local_sizes), matrix.shape[1])
        pieces = zip(*(rows.split(whole) for rows, _ in pairs), strict=True)
        works: list = []
        for inputs, out in zip(pieces, result.split(self.pieces.local_sizes)):
            # By out=, as in gather_mm: selective recomputation would keep what mm returns, here S positions for S/t of result.
            partial = torch.mm(inputs[0], matrix, out=result.new_empty(inputs[0].shape[0], matrix.shape[1]))
            for rows, (_, other) in zip(inputs[1:], pairs[1:]):
                partial.addmm_(rows, other)
            if len(works) > 1:
                works[-2].wait()  # so that no more than two partial results exist
            works += start_scatter_sum(partial, self.group, out=out).works
        return Pending(result, works)


def _in_turn(rows: Tensor, sizes: list[int]) -> list[Tensor]:
    """Room for pieces of these rows, in two buffers that take turns: one is read while the other is written."""
    buffers = [rows.new_empty(max(sizes), rows.shape[1]) for _ in sizes[:2]]
    return [buffers[index % 2][:size] for index, size in enumerate(sizes)]


class SymmetricMemory(Chunked):
    """torch's kernels over symmetric memory (async tensor parallelism), which split into pieces themselves.

    Not run on a GPU; checked on the CPU against torch's own plain versions of the two operators.
    """

    def __init__(self, pieces: Pieces, group: dist.ProcessGroup):
        super().__init__(replace(pieces, chunks=1), group)

    @staticmethod
    def unavailable(demand: Demand) -> str | None:
        """As in Chunked."""
        if demand.device != "cuda":
            return f"symmetric memory is there on cuda alone, not on {demand.device}"
        return None if load_symmetric_memory() else f"torch {torch.__version__} has no symm_mem.fused_all_gather_matmul"

    def gather_mm(self, rows: Tensor, matrices: Sequence[Tensor], *, keep: bool = False) -> Products:
        """As in Chunked."""
        name = self.group.group_name
        count("all_gather", self.group)
        gathered, products = torch.ops.symm_mem.fused_all_gather_matmul(rows.contiguous(), list(matrices), 0, name, return_A=keep)
        return products, gathered

    def start_mm_scatter(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Pending:
        """As in Chunked; a sum of products is one product of joined factors. Done when it returns, in the order of the device."""
        (rows, matrix), several = pairs[0], len(pairs) > 1
        if several:
            rows, matrix = torch.cat([rows for rows, _ in pairs], 1), torch.cat([matrix for _, matrix in pairs])
        count("reduce_scatter", self.group)
        return Pending(torch.ops.symm_mem.fused_matmul_reduce_scatter(rows, matrix, "sum", 0, self.group.group_name))
