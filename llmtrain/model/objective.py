"""Objectives: pure functions from a model's outputs to the sum that the engine divides by the global number of targets."""

from collections.abc import Callable

from torch import Tensor

Objective = Callable[[dict[str, Tensor]], Tensor]


def cross_entropy(outputs: dict[str, Tensor]) -> Tensor:
    """The summed cross-entropy over target tokens, a scalar."""
    return outputs["ce_sum"]
