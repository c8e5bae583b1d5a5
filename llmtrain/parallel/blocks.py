"""What the functions that apply parallelism walk over."""

from collections.abc import Iterator

from torch import nn


def all_blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The blocks of `model` in the order in which they run, those of its multi-token-prediction heads last."""
    yield from model.blocks.values()
    for head in getattr(model, "mtp", None) or ():
        yield head.block
