"""Products and collectives of tp as one operator of torch_npu each (Huawei's MC2, Pangu Ultra, arXiv 2504.07866).

torch_npu 2.13.0 gives npu_all_gather_base_mm and npu_mm_reduce_scatter_base, which split into pieces and overlap them themselves, and no
gradients: those are llmtrain.parallel.ops.fused's, where each is the other's backward. npu_mm_all_reduce_base serves no pair, as ranks of
tp share the sequence. Not run on hardware; see docs/npu-checks.md.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from llmtrain.compat import hccl_name
from llmtrain.ops.npu import gateway
from llmtrain.parallel.hang.where import count
from llmtrain.parallel.ops.implementations import Chunked, Demand, Products
from llmtrain.parallel.ops.npu_limits import refuse_pairs
from llmtrain.parallel.ops.pending import Pending
from llmtrain.parallel.ops.pieces import Pieces


class MC2(Chunked):
    """torch_npu's operators. `chunks` means nothing to them."""

    def __init__(self, pieces: Pieces, group: dist.ProcessGroup):
        super().__init__(replace(pieces, chunks=1), group)

    @staticmethod
    def unavailable(demand: Demand) -> str | None:
        """As in Chunked."""
        return refuse_pairs(demand)

    def start_gather(self, rows: Tensor) -> Pending:
        """As in Chunked, but waited for: the operators use the same communicator, and nothing orders the two."""
        return Pending(super().start_gather(rows).wait())

    def gather_mm(self, rows: Tensor, matrices: Sequence[Tensor], *, keep: bool = False) -> Products:
        """As in Chunked. The widest product hides the gathering, the others take the gathered rows: joining matrices would copy them."""
        widest = max(range(len(matrices)), key=lambda index: matrices[index].shape[1])
        several = len(matrices) > 1
        count("all_gather", self.group)
        # The operator takes no transposed rows, but transposed matrices.
        product, gathered = gateway.fused("npu_all_gather_base_mm")(
            rows.contiguous(), matrices[widest], hccl_name(self.group), self.group.size(), gather_index=0, gather_output=keep or several
        )
        products = [product if index == widest else _product(gathered, matrix) for index, matrix in enumerate(matrices)]
        return products, gathered if keep else None

    def start_mm_scatter(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Pending:
        """As in Chunked; a sum of products is one product of joined factors. Done when it returns, in the order of the device."""
        (rows, matrix), several = pairs[0], len(pairs) > 1
        if several:
            rows, matrix = torch.cat([rows for rows, _ in pairs], 1), torch.cat([matrix for _, matrix in pairs])
        count("reduce_scatter", self.group)
        name, ranks = hccl_name(self.group), self.group.size()
        return Pending(gateway.fused("npu_mm_reduce_scatter_base")(rows.contiguous(), matrix, name, ranks, reduce_op="sum"))


def _product(rows: Tensor, matrix: Tensor) -> Tensor:
    """By out=, as in Chunked: selective recomputation would keep what mm returns."""
    return torch.mm(rows, matrix, out=rows.new_empty(rows.shape[0], matrix.shape[1]))
