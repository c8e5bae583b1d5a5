"""Model families by name. A plugin registers its own; `model.family` picks one."""

import difflib
from collections.abc import Callable

from torch import nn

from llmtrain.config.model import ModelConfig
from llmtrain.errors import UserError

_FAMILIES: dict[str, Callable[..., nn.Module]] = {}


class UnknownFamily(UserError, ValueError):
    """`model.family` names no registered family."""


def register_family(name: str) -> Callable:
    """Decorate a factory `(cfg: ModelConfig, ops, loss_chunk) -> nn.Module` as the family `name`.

    The module has what docs/interfaces.md asks of a model. A method `initial(name) -> float | None` may set the starting value of the
    parameter `name`: the constant of a vector, the standard deviation of a matrix; None leaves it to `model.init`.
    """

    def decorate(factory: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
        if _FAMILIES.get(name, factory) is not factory:
            raise ValueError(f"model family {name!r} is registered twice: {_FAMILIES[name]!r} and {factory!r}")
        _FAMILIES[name] = factory
        return factory

    return decorate


def check_family(name: str) -> None:
    """Raise UnknownFamily unless a family of this name is registered."""
    import llmtrain.model  # noqa: F401 (registers the built-in family)

    if name not in _FAMILIES:
        near = difflib.get_close_matches(name, _FAMILIES, 1, 0.5)
        hint = f"; did you mean {near[0]}?" if near else "; a plugin may add one (`plugins: [module]`)"
        raise UnknownFamily(f"model.family: {name!r} is not registered; allowed: {', '.join(sorted(_FAMILIES))}{hint}")


def build(cfg: ModelConfig, ops, loss_chunk: int | None) -> nn.Module:
    """The model that `cfg` describes, its parameters empty, on the current default device (use `with torch.device("meta")`).

    `ops` is the chosen ops (llmtrain.ops.resolve); `loss_chunk` the tokens whose logits exist at once in the loss.
    Raises UnknownFamily if `model.family` names no registered family.
    """
    check_family(cfg.family)
    return _FAMILIES[cfg.family](cfg, ops, loss_chunk)
