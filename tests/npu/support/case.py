"""What a check of a wrapper in llmtrain/ops/npu needs: inputs, the call, the formula that judges it, and how far off a result may be."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

ERRORS = {
    # Error over the largest number of the result. fp32: sums of some ten products in an order of their own. bf16 keeps 8 bits, so results
    # are off by 2^-9 when rounded, and gradients are made of results that were rounded once or twice before. fp16 keeps 11 bits: an eighth.
    torch.float32: 2e-6,
    torch.bfloat16: 2e-2,
    torch.float16: 2.5e-3,
}

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """`inputs()` gives CPU tensors, floating ones in float64. `call` takes them by name on a device, in the dtype of the check, and
    `formula` in float64: both give a tensor or a tuple. Gradients are checked for the inputs in `gradients`.
    """

    wrapper: str
    variant: str
    inputs: Callable[[], Inputs]
    call: Callable[..., Any]
    formula: Callable[..., Any]
    gradients: tuple[str, ...] = ()
    called_by_models: bool = True
    wide: tuple[str, ...] = ()
    """Inputs that stay in float32 whatever the dtype."""
    dtypes: tuple[torch.dtype, ...] = tuple(ERRORS)
    also: tuple[str, ...] = ()
    """Other wrappers that this case calls."""
    graph: str = ""
    """For a wrapper that is called without autograd: the case in which it is part of a graph, whose gradients judge it."""

    @property
    def name(self) -> str:
        return f"{self.wrapper}-{self.variant}" if self.variant else self.wrapper


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)
