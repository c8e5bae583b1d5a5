"""A plugin: an implementation of swiglu that goes wrong at one micro-batch of one rank, as POISON says: `CALL NaN`, `CALL 1e4`, ..."""

import os
from itertools import count

import torch

from llmtrain.ops.registry import register

CALLS = count()
BAD = {int(number): float(factor) for number, factor in (item.split("=") for item in os.environ.get("POISON", "").split(",") if item)}


@register("swiglu", "poison", speed=-1.0)
def poison(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, times the factor that POISON gives for this call of rank POISON_RANK."""
    call = next(CALLS)
    factor = BAD.get(call, 1.0) if os.environ.get("RANK", "0") == os.environ.get("POISON_RANK", "0") else 1.0
    return torch.nn.functional.silu(gate) * up * factor
