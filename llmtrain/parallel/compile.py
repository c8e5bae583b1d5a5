"""torch.compile applied to a model's blocks from outside."""

import shutil
from dataclasses import dataclass

import torch
from torch import nn

from llmtrain.config.parameters import flops_per_token
from llmtrain.config.run import RunConfig
from llmtrain.errors import UserError
from llmtrain.layout.steps import StepPlan
from llmtrain.parallel.blocks import all_blocks

WORTH = {"cpu": 1e15, "cuda": 1e17}
"""FLOPs of a rank's share of the run from which `auto` compiles.

Compiling takes about 30 s for each sequence length. On the CPU it saves some percent of a step (bench/README.md), so it pays after about
two hours of two cores. The figure for CUDA is an estimate (a tenth saved, 5 minutes of an A100); it was not measured.
"""

PARTS = ("before_attention", "after_attention")


@dataclass(frozen=True)
class Decision:
    """Whether the blocks are compiled, and why."""

    on: bool
    reason: str

    def __str__(self) -> str:
        return f"{'on' if self.on else 'off'} ({self.reason})"


def decide(cfg: RunConfig, *, kind: str, ranks: int) -> Decision:
    """What train.compile comes to on a device of `kind` with `ranks` ranks. The same on every rank and after every resumption.

    Raises UserError if it is `on` and cannot be.
    """
    wanted = cfg.train.compile
    if wanted == "off":
        return Decision(False, "train.compile")
    obstacle = _obstacle(cfg, kind)
    if wanted == "on":
        if obstacle:
            raise UserError(f"train.compile on: {obstacle}; set train.compile to off or auto")
        return Decision(True, "train.compile")
    if obstacle:
        return Decision(False, obstacle)
    if cfg.model.family != "transformer":
        return Decision(False, f"model.family {cfg.model.family} may not compile; on tries it")
    if not (cfg.train.steps or cfg.train.tokens or cfg.train.phases):
        return Decision(False, "the run has no length")
    work = sum(phase.tokens * flops_per_token(cfg.model, phase.seq_len) for phase in StepPlan.from_config(cfg).phases) / ranks
    worth = WORTH[kind]
    if work < worth:
        return Decision(False, f"{work:.1e} FLOPs a rank; below {worth:.0e} compiling would take longer than it saves")
    return Decision(True, f"{work:.1e} FLOPs a rank; from {worth:.0e} on it pays")


def _obstacle(cfg: RunConfig, kind: str) -> str | None:
    if kind not in WORTH:
        return f"torch.compile has not been tried on {kind}"
    p = cfg.parallel
    if max(p.tp, p.cp, p.ep) > 1:
        return "the collectives of parallel.tp, cp and ep inside the blocks have not been tried under torch.compile"
    if cfg.model.ffn.kind == "moe":
        return "the rows that a mixture of experts sends to each expert change with every batch"
    if cfg.train.recompute == "selective":
        return "train.recompute selective decides op by op, which compiled code hides; full works"
    if not isinstance(cfg.train.recompute, str) or cfg.train.offload:
        return "modules that train.recompute names, and train.offload, are told apart by what they save, which compiled code hides"
    if kind == "cpu" and not any(map(shutil.which, ("g++", "clang++"))):
        return "compiling for the CPU needs a C++ compiler, and neither g++ nor clang++ is on the PATH"
    return None


def apply_compile(model: nn.Module) -> None:
    """Compile what comes before and after the attention op of every block, in place; parameter names do not change.

    All blocks share their code, so each of the two parts is compiled once per shape. The attention op stays outside: its kernel is
    chosen already, and its mask is another one in every batch, for each of which it would be compiled anew.
    Raises UserError for a block without these parts.
    """
    for block in all_blocks(model):
        for part in PARTS:
            if not hasattr(block, part):
                raise UserError(f"train.compile on: a block of {type(block).__name__} has no method {part}; set train.compile to off")
            setattr(block, part, torch.compile(getattr(block, part), fullgraph=True, dynamic=False))


def eager():
    """Context in which compiled parts run uncompiled: for rare calls whose shapes or hooks would be compiled for themselves."""
    return torch.compiler.set_stance("force_eager")
