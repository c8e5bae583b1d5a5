"""Activation checkpointing, applied to a model's blocks from outside."""

from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import llmtrain.ops  # noqa: F401 (defines tiled_attention)
from llmtrain.parallel.blocks import all_blocks

aten = torch.ops.aten

# What costs far more to compute again than to keep: matrix products and attention.
KEPT = {
    getattr(aten, name).default
    for name in (
        "mm",
        "addmm",
        "bmm",
        "_grouped_mm",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
    )
    if hasattr(aten, name)
} | {torch.ops.llmtrain.tiled_attention.default}


def _policy(ctx, op, *args, **kwargs) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in KEPT else CheckpointPolicy.PREFER_RECOMPUTE


def apply_recompute(model: nn.Module, mode: str) -> None:
    """Recompute activations of every block in the backward pass: `none`, `selective` (matmuls and attention are kept) or `full`.

    The block's forward is wrapped on the instance, so parameter names do not change.
    """
    if mode == "none":
        return
    extra = {"context_fn": partial(create_selective_checkpoint_contexts, _policy)} if mode == "selective" else {}
    for block in all_blocks(model):
        # Nothing in a block draws random numbers, so there is no state to restore.
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False, **extra)
