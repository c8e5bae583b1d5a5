"""Mistakes put between llmtrain/parallel/ops and torch_npu's joined operators, each of which some column has to catch."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

PAIRS, EXCHANGE = ("npu_all_gather_base_mm", "npu_mm_reduce_scatter_base"), ("npu_alltoallv_gmm", "npu_gmm_alltoallv")
WRAPPERS = dict(zip(PAIRS + EXCHANGE, ("all_gather_matmul", "matmul_reduce_scatter", "alltoallv_matmul", "matmul_alltoallv")))
"""Operator -> its wrapper, a row of docs/npu-checks.md."""


@dataclass(frozen=True)
class Fault:
    """The `operators` get their arguments (a list, and those by name) changed by `how`; `check` of collective_world is run with it."""

    name: str
    check: str
    operators: tuple[str, ...]
    how: Callable[[list, dict[str, Any]], tuple[list, dict[str, Any]]]

    def change(self, name: str, operator: Callable) -> Callable:
        """For `checks.between`."""
        if name not in self.operators:
            return operator

        def call(*args: Any, **options: Any) -> Any:
            args, options = self.how(list(args), options)
            return operator(*args, **options)

        return call

    @property
    def wrappers(self) -> list[str]:
        return [WRAPPERS[operator] for operator in self.operators]


def _swap_counts(args, options):
    args[4], args[5] = args[5], args[4]
    return args, options


def _ranks(args, options):
    args[3] = 2 * args[3]
    return args, options


def _untransposed(args, options):
    return args, options | {"trans_gmm_weight": not options["trans_gmm_weight"]}


def _square(args, options):
    """A matrix of as many rows as columns transposed, which no shape tells."""
    args[1] = args[1].t() if args[1].shape[0] == args[1].shape[1] else args[1]
    return args, options


def _with(**changed: Any):
    return lambda args, options: (args, options | changed)


GATHER, SCATTER, EXPERTS = "gather_matmul", "matmul_scatter", "fused_experts"
FAULTS = [
    Fault("swapped counts, there", EXPERTS, EXCHANGE[:1], _swap_counts),
    Fault("swapped counts, back", EXPERTS, EXCHANGE[1:], _swap_counts),
    Fault("wrong world size of a pair", GATHER, PAIRS, _ranks),
    Fault("wrong world size of an exchange", EXPERTS, EXCHANGE, _ranks),
    Fault("wrong gather index", GATHER, PAIRS[:1], _with(gather_index=1)),
    Fault("mean for sum", SCATTER, PAIRS[1:], _with(reduce_op="mean")),
    Fault("op in the place of reduce_op", SCATTER, PAIRS[1:], _with(op="sum")),
    Fault("transposed weights of experts", EXPERTS, EXCHANGE, _untransposed),
    Fault("transposed weight of a pair", GATHER, PAIRS, _square),
    Fault("rows of three dims", GATHER, PAIRS, lambda args, options: ([args[0][None], *args[1:]], options)),
    Fault("matrices of too few dims", EXPERTS, EXCHANGE, lambda args, options: ([args[0], args[1][0], *args[2:]], options)),
]
BY_NAME = {fault.name: fault for fault in FAULTS}
