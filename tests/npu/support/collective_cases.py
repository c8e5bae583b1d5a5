"""Every call of torch_npu's joined operators in llmtrain/parallel/ops, for the checks that need no second process: schema, fake, host."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from llmtrain.ops.npu.experts import grouped_mm_npu
from llmtrain.parallel.ops.npu import MC2
from llmtrain.parallel.ops.npu_experts import Exchange
from llmtrain.parallel.ops.pieces import Pieces

RANKS, SENT, ARRIVING = 2, [3, 0, 2, 1], [3, 0, 4, 2]  # rows by rank and expert, two of these on each rank


class Group:
    """What the calls ask of a process group; collectives of its own it has none."""

    group_name = group_desc = "group of two"

    def size(self) -> int:
        return RANKS

    def _get_backend(self, device: torch.device) -> "Group":
        return self

    def get_hccl_comm_name(self, rank: int) -> str:
        return "group of two"


@dataclass(frozen=True)
class CollectiveCase:
    """`call` with `tensor(*sizes)` for inputs gives tensors of `shapes`."""

    wrapper: str
    variant: str
    call: Callable[[Callable[..., Tensor]], Any]
    shapes: list[tuple[int, ...]]

    @property
    def name(self) -> str:
        return f"{self.wrapper}-{self.variant}"


def _pair() -> MC2:
    return MC2(Pieces(batch=1, length=4, ranks=RANKS, chunks=1), Group())


def _exchange(tensor) -> Exchange:
    counts = torch.tensor([7, 2], dtype=torch.int64, device=tensor(1).device)
    return Exchange(Group(), SENT, ARRIVING, counts, grouped_mm_npu)


def _gather(tensor, *, several: bool, keep: bool) -> list[Tensor]:
    matrices = [tensor(12, 16).t(), tensor(10, 16).t()][: 2 if several else 1]
    products, gathered = _pair().gather_mm(tensor(4, 16), matrices, keep=keep)
    return [*products, gathered] if keep else products


def _scatter(tensor, *, several: bool) -> list[Tensor]:
    pairs = [(tensor(8, 12), tensor(12, 16)), (tensor(8, 10), tensor(10, 16))] if several else [(tensor(8, 12), tensor(16, 12).t())]
    return [_pair().start_mm_scatter(pairs).wait()]


def _send(tensor, *, transposed: bool, keep: bool) -> list[Tensor]:
    weight = tensor(2, 12, 8) if transposed else tensor(2, 8, 12)
    product, arrived = _exchange(tensor).send_and_multiply(tensor(6, 8), weight, transposed=transposed, keep=keep)
    return [product, arrived] if keep else [product]


def _return(tensor, *, transposed: bool) -> list[Tensor]:
    weight = tensor(2, 8, 12) if transposed else tensor(2, 12, 8)
    return [_exchange(tensor).multiply_and_return(tensor(9, 12), weight, transposed=transposed)]


GATHER, SCATTER, SEND, RETURN = "all_gather_matmul", "matmul_reduce_scatter", "alltoallv_matmul", "matmul_alltoallv"
CASES = [
    CollectiveCase(GATHER, "one", partial(_gather, several=False, keep=False), [(8, 12)]),
    CollectiveCase(GATHER, "backward of the other", partial(_gather, several=False, keep=True), [(8, 12), (8, 16)]),
    CollectiveCase(GATHER, "several", partial(_gather, several=True, keep=False), [(8, 12), (8, 10)]),
    CollectiveCase(SCATTER, "one", partial(_scatter, several=False), [(4, 16)]),
    CollectiveCase(SCATTER, "backward of the other", partial(_scatter, several=True), [(4, 16)]),
    CollectiveCase(SEND, "rows alone", partial(_send, transposed=False, keep=False), [(9, 12)]),
    CollectiveCase(SEND, "kept", partial(_send, transposed=False, keep=True), [(9, 12), (9, 8)]),
    CollectiveCase(SEND, "backward of the other", partial(_send, transposed=True, keep=True), [(9, 12), (9, 8)]),
    CollectiveCase(SEND, "weights", lambda tensor: [_exchange(tensor).weight_gradient(tensor(9, 8), tensor(9, 12))], [(2, 8, 12)]),
    CollectiveCase(RETURN, "forward", partial(_return, transposed=False), [(6, 8)]),
    CollectiveCase(RETURN, "backward of the other", partial(_return, transposed=True), [(6, 8)]),
]
