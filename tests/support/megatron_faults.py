"""Marks of parameters that the engine megatron sets for megatron-core, one of them wrong, and the row that each must spoil."""

from collections.abc import Iterator
from contextlib import contextmanager

from parity_rows import Row


def norm_alone(held: dict) -> None:
    """Gradients of a norm stay each rank's part of the sequence: no sum over tp."""
    held["decoder.layers.1.input_layernorm.weight"].parameter.sequence_parallel = False


def cut_unmarked(held: dict) -> None:
    """A cut projection is taken for one that every rank has whole: the norm counts one rank's rows alone."""
    held["decoder.layers.1.mlp.linear_fc1.weight"].parameter.tensor_model_parallel = False


def experts_unmarked(held: dict) -> None:
    """Experts without expert parallelism are taken for dense layers: no sum over the ranks of tp that share them."""
    for name, one in held.items():
        if ".local_experts." in name:
            one.parameter.allreduce = True


FAULTS = {
    "norm alone": (norm_alone, Row({"tp": 2})),
    "cut unmarked": (cut_unmarked, Row({"tp": 2})),
    "experts unmarked": (experts_unmarked, Row({"tp": 2}, "BigMac, shared")),
}


@contextmanager
def marks(fault: str) -> Iterator[None]:
    """Engines that are built inside have the wrong mark."""
    from llmtrain.engine.megatron_state import Layout

    mark, (spoil, _) = Layout.mark, FAULTS[fault]

    def marked(layout) -> None:
        mark(layout)
        spoil(layout.held)

    Layout.mark = marked
    try:
        yield
    finally:
        Layout.mark = mark
