"""The whole gradients of a step by canonical name, from each engine's own hands."""

from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor

from llmtrain.parallel.fsdp import local_tensor


def full(tensor: Tensor) -> Tensor:
    """All of a tensor that may be a DTensor."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else local_tensor(tensor)


def _native(engine: Any) -> dict[str, Tensor]:
    return {name: full(p.grad) for name, p in engine.parameters.items() if p.grad is not None}  # frozen ones have none


def _deepspeed(engine: Any) -> dict[str, Tensor]:
    from deepspeed.utils import safe_get_full_grad

    ranks = engine.mesh.world  # it averages
    return {name: safe_get_full_grad(parameter) * ranks for name, parameter in engine.parameters.items()}


BY_KIND: dict[str, Callable[[Any], dict[str, Tensor]]] = {"native": _native, "deepspeed": _deepspeed}
"""Called by all ranks together, between a backward pass and a step."""


def gradients(engine: Any) -> dict[str, np.ndarray]:
    """In float64, of all parameters that this rank's engine has."""
    return {name: value.cpu().double().clone().numpy() for name, value in BY_KIND[engine.cfg.engine.kind](engine).items()}
