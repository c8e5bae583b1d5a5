"""Objectives: pure functions from a model's outputs to the sum that the engine divides by the global number of targets."""

from collections.abc import Callable

from torch import Tensor

Objective = Callable[[dict[str, Tensor]], Tensor]


def cross_entropy(outputs: dict[str, Tensor]) -> Tensor:
    """The summed cross-entropy over target tokens, a scalar; with heads of multi-token prediction plus their weighted sums.

    ce_sum + loss_weight / heads * mtp_ce_sum. The engine divides all of it by one number, the targets of the next token in the whole step,
    although a head has slightly fewer targets of its own: the last ones of a document have none.
    """
    if "mtp_ce_sum" not in outputs:
        return outputs["ce_sum"]
    return outputs["ce_sum"] + outputs["mtp_weight"] * outputs["mtp_ce_sum"]


def ascent(outputs: dict[str, Tensor]) -> Tensor:
    """Minus the summed cross-entropy: minimising it climbs the loss of the text (Gradient Ascent Post-training, arXiv 2306.07052)."""
    return -cross_entropy(outputs)
