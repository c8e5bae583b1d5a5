"""Options that spare a device's memory: what they may name, and what goes together."""

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from llmtrain.config.run import RunConfig

Recomputed = Literal["mla_up", "norms", "activation", "permute"]
"""Modules of a block that train.recompute may name."""

Offloaded = Literal["block_input", "attention_input", "ffn_input", "expert_output"]
"""Activations that train.offload may name."""

MOMENT_SLICES = 16
"""In which optim.offload brings the optimizer's moments to the device. It holds three: one arrives, one leaves, one is updated."""


def check_memory(run: "RunConfig") -> None:
    """Raise ValueError for train.recompute and train.offload that the model has no use for, or that both take the same."""
    recompute, offload = run.train.recompute, run.train.offload
    named = [] if isinstance(recompute, str) else recompute
    for option, names in (("recompute", named), ("offload", offload)):
        if len(set(names)) < len(names):
            raise ValueError(f"train.{option} names something twice: {', '.join(names)}")
    if "mla_up" in named and run.model.attention.kind != "mla":
        raise ValueError(f"train.recompute mla_up: model.attention.kind {run.model.attention.kind} has no up-projections; take mla_up out")
    for option, names in (("recompute permute", named), ("offload expert_output", offload)):
        if option.split()[1] in names and run.model.ffn.kind != "moe":
            raise ValueError(f"train.{option}: model.ffn.kind {run.model.ffn.kind} has no experts; take {option.split()[1]} out")
    inside = [name for name in offload if name != "block_input"]
    if inside and recompute in ("selective", "full"):
        raise ValueError(f"train.offload {inside[0]}: with train.recompute {recompute} a block keeps its input alone; take {inside[0]} out")
    both = [name for name in inside if name.endswith("_input")]
    if both and "norms" in named:
        raise ValueError(f"train.offload {both[0]} is what train.recompute norms computes again; take one of them out")
