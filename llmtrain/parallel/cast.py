"""Computing in 16 bits with wider parameters on one rank, as FSDP2's mixed precision does on several, without its collectives."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from llmtrain.compat import swapped_parameters
from llmtrain.parallel.blocks import all_blocks


def apply_cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Let every block of `model`, and the projections before those of multi-token prediction, compute with copies of its parameters in
    `dtype`, in place; names do not change.

    Embeddings are cast after the lookup, and norms and head bring their own weights to what they are given, so no copy of the largest
    gradients is made. Gradients come out in the parameters' dtype.
    """
    projections = [head.proj for head in getattr(model, "mtp", None) or ()]
    for module in [*all_blocks(model), *projections]:
        module.forward = partial(_with_cast, module, module.forward, dtype)
    for embedding in (model.embedding, getattr(model, "position_embedding", None)):
        if embedding is not None:
            embedding.forward = partial(_cast_after, embedding.forward, dtype)


def _with_cast(module: nn.Module, forward: Callable, dtype: torch.dtype, *args: Any, **kwargs: Any) -> Tensor:
    with swapped_parameters(module, {name: parameter.to(dtype) for name, parameter in module.named_parameters()}):
        return forward(*args, **kwargs)


def _cast_after(forward: Callable, dtype: torch.dtype, tokens: Tensor) -> Tensor:
    return forward(tokens).to(dtype)
