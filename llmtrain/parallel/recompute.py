"""Activation checkpointing, applied to a model's blocks from outside: of whole blocks, or of named modules in them."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from llmtrain.errors import UserError
from llmtrain.model.experts import Dispatched, Dispatcher, RoutedExperts
from llmtrain.model.mla import LatentAttention
from llmtrain.model.moe import MoE
from llmtrain.model.norm import LayerNorm, RMSNorm
from llmtrain.parallel.blocks import all_blocks
from llmtrain.parallel.cp import ContextParallel
from llmtrain.parallel.ep import SplitExperts
from llmtrain.parallel.saved import Repeated, Saving

ATTENTION = {
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "llmtrain::tiled_attention",
}
"""Operators of attention that give their whole result at once."""

KEPT = {"aten::mm", "aten::addmm", "aten::bmm", "aten::_grouped_mm", *ATTENTION}
"""What costs far more to compute again than to keep: matrix products and attention."""


def _policy(ctx, op, *args, **kwargs) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op.name() in KEPT else CheckpointPolicy.PREFER_RECOMPUTE


def apply_recompute(model: nn.Module, what: str | Sequence[str]) -> None:
    """Recompute activations of every block in the backward pass, as `train.recompute` says: `none`, `selective` (matmuls and attention are
    kept), `full`, or the names of modules (MODULES).

    Forwards are wrapped on the instances, so parameter names do not change. Raises UserError for a module that is not there.
    """
    if what == "none":
        return
    if not isinstance(what, str):
        for name in what:
            MODULES[name](model, Saving.of(model))
        return
    extra = {"context_fn": partial(create_selective_checkpoint_contexts, _policy)} if what == "selective" else {}
    for block in all_blocks(model):
        # Nothing in a block draws random numbers, so there is no state to restore.
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False, **extra)


def _norms(model: nn.Module, saving: Saving) -> None:
    for norm in _modules(model, RMSNorm, LayerNorm):
        norm.forward = partial(_norm, saving, norm, norm.forward)


def _norm(saving: Saving, norm: nn.Module, forward: Callable[..., Any], x: Tensor, residual: Tensor | None = None) -> Any:
    if residual is None or not saving.on:
        return saving.again(forward, x, module=norm) if residual is None else forward(x, residual)
    total = residual + x  # is kept in any case, while what one kernel makes of both would need both again
    return saving.again(forward, total, module=norm), total


def _activation(model: nn.Module, saving: Saving) -> None:
    for module in _modules(model, nn.Module):
        if hasattr(module, "activate"):
            module.activate = partial(saving.again, module.activate)


def _mla_up(model: nn.Module, saving: Saving) -> None:
    for attention in _modules(model, LatentAttention):
        if _on_a_ring(attention.attend):  # which keeps keys and values in a form of its own, and many outputs
            attention.expand = partial(saving.again, attention.expand, module=attention)
        else:
            attention.attend = partial(_attend, saving, attention, attention.expand, attention.attend)
            attention.expand = _as_given


def _attend(
    saving: Saving, attention: nn.Module, expand: Callable, attend: Callable, *given: Tensor, mask: Any, cache: Any = None
) -> Tensor:
    """Attention from what `expand` is given: kernels save queries, keys and values in forms of their own, which go too."""
    if cache is not None:
        return attend(*expand(*given), mask=mask, cache=cache)
    kept = ATTENTION | {"npu::npu_fusion_attention"}
    return saving.again(lambda *narrow: attend(*expand(*narrow), mask=mask), *given, module=attention, keeping=kept)


def _as_given(*given: Tensor) -> tuple[Tensor, ...]:
    return given


def _on_a_ring(attend: Callable) -> bool:
    cp = getattr(attend, "__self__", None)
    return isinstance(cp, ContextParallel) and cp.kind == "ring"


def _permute(model: nn.Module, saving: Saving) -> None:
    for layer in _modules(model, MoE):
        routed = layer.routed
        if isinstance(routed, SplitExperts):
            routed.gather = partial(saving.again, routed.gather)
        _send_again(dispatcher_of(layer, "train.recompute permute"), saving)


def _send_again(dispatcher: Dispatcher, saving: Saving) -> None:
    """Let `dispatcher` forget the rows that arrived: the backward pass sends them again."""
    start, wait = dispatcher.start, dispatcher.wait

    def start_and_remember(x: Tensor, probs: Tensor, ids: Tensor) -> tuple:
        return start(x, probs, ids), (x, probs, ids)

    def wait_and_forget(handle: tuple) -> Dispatched:
        leaving, given = handle
        arrived = wait(leaving)
        if saving.on:
            Repeated(saving, lambda *sent: wait(start(*sent)).rows, given).mark(arrived.rows)
        return arrived

    dispatcher.start, dispatcher.wait = start_and_remember, wait_and_forget


MODULES: dict[str, Callable[[nn.Module, Saving], None]] = {
    "mla_up": _mla_up,
    "norms": _norms,
    "activation": _activation,
    "permute": _permute,
}
"""What makes each module that `train.recompute` may name compute again."""


def dispatcher_of(layer: MoE, option: str) -> Dispatcher:
    """What moves the rows of `layer`. Raises UserError that names `option` where that is no object of its own."""
    routed = layer.routed.inner if isinstance(layer.routed, SplitExperts) else layer.routed
    if not isinstance(routed, RoutedExperts):
        raise UserError(f"{option}: {type(routed).__name__} has no dispatcher of its own; set parallel.ep_kind all_to_all, or drop it")
    return routed.dispatcher


def _modules(model: nn.Module, *kinds: type[nn.Module]) -> list[nn.Module]:
    """Those of these kinds in the model's blocks."""
    return [module for block in all_blocks(model) for module in block.modules() if isinstance(module, kinds)]
