"""Model families by name. A plugin registers its own; `model.family` picks one."""

from collections.abc import Callable

from torch import nn

from llmtrain.config.model import ModelConfig

_FAMILIES: dict[str, Callable[..., nn.Module]] = {}


def register_family(name: str) -> Callable:
    """Decorate a factory `(cfg: ModelConfig, ops, loss_chunk) -> nn.Module` as the family `name`."""

    def decorate(factory: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
        if _FAMILIES.get(name, factory) is not factory:
            raise ValueError(f"model family {name!r} is registered twice: {_FAMILIES[name]!r} and {factory!r}")
        _FAMILIES[name] = factory
        return factory

    return decorate


def build(cfg: ModelConfig, ops, loss_chunk: int) -> nn.Module:
    """The model that `cfg` describes, its parameters empty, on the current default device (use `with torch.device("meta")`).

    `ops` is the chosen ops (llmtrain.ops.resolve); `loss_chunk` the tokens whose logits exist at once in the loss.
    Raises ValueError if `model.family` names no registered family.
    """
    if cfg.family not in _FAMILIES:
        raise ValueError(f"model.family {cfg.family!r} is not registered; known: {', '.join(sorted(_FAMILIES))} (a plugin may add one)")
    return _FAMILIES[cfg.family](cfg, ops, loss_chunk)
