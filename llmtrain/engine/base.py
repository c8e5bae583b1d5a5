"""The engine interface, and the registry of engines."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from llmtrain.data.batch import Batch
from llmtrain.engine.support import refusal
from llmtrain.errors import UserError


@dataclass(frozen=True)
class StepResult:
    """What a forward (and backward) over one step's micro-batches gave; the same values on every rank.

    `loss_sum` is the objective, in nats, over `target_count` tokens.
    `bad_samples` are the samples of micro-batches whose loss was not finite.
    """

    loss_sum: float
    target_count: int
    metrics: dict[str, Any] = field(default_factory=dict)
    bad_samples: tuple[int, ...] = ()
    expert_counts: torch.Tensor | None = None
    """[L,E] int64: how often the step's tokens chose each expert of each mixture of experts; None without any."""
    events: tuple[str, ...] = ()
    """What else happened and is to be said, in words."""

    @property
    def loss(self) -> float:
        """Mean objective per target token, in nats: the cross-entropy, or what a stage minimises instead."""
        return self.loss_sum / max(1, self.target_count)


@dataclass(frozen=True)
class Capabilities:
    """What an engine can do; a run that needs more is refused when it is built."""

    discard: bool
    """Can throw a step's gradients away after seeing them."""
    axes: tuple[str, ...]
    """Mesh axes it runs."""
    dtypes: tuple[str, ...]
    """Compute formats it runs."""
    adapters: bool = False
    """Can train adapters beside frozen weights (`lora`)."""


class Engine(Protocol):
    """Runs steps of one model. Every call is made by all ranks together."""

    def capabilities(self) -> Capabilities:
        """What it can do."""

    def forward_backward(self, micro_batches: Sequence[Batch]) -> StepResult:
        """Gradients of objective(sum over targets) / targets of the whole step, over all ranks and micro-batches."""

    def grad_norm(self) -> float:
        """Global 2-norm of the gradients now held, before clipping."""

    def overflowed(self) -> bool:
        """Whether these gradients overflowed an fp16 loss scale: an event, not a fault; the loop discards the step and goes on."""

    def apply(self, *, lr: float) -> None:
        """Clip, take the optimizer step, drop the gradients."""

    def discard(self) -> None:
        """Drop the gradients. Engines that cannot say so in capabilities()."""

    def evaluate(self, micro_batches: Sequence[Batch]) -> StepResult:
        """The loss alone."""

    def logits(self, tokens: torch.Tensor, *, positions: torch.Tensor | None = None) -> torch.Tensor:
        """Logits [B, S, V] of tokens [B, S], on every rank."""

    def begin_phase(self, *, rope_base: float) -> None:
        """Settings that change between phases."""

    def calibrate(self, batch: Batch) -> dict[str, float]:
        """Measure what the configuration left to `auto`, once, before step 0 of a fresh run; returns the values."""

    def state(self) -> dict[str, torch.Tensor]:
        """Canonical state (docs/interfaces.md): live tensors until the next step, so loading into them in place restores the engine."""

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """Take over a canonical state, which may be the tensors of state() filled in place."""

    def extra_state(self) -> dict:
        """JSON-able state beside the tensors (loss scale, places of experts), the same on every rank."""

    def load_extra_state(self, extra: dict) -> None:
        """Take over extra_state()."""


ENGINES: dict[str, Callable[..., Engine]] = {}
CHECKS: dict[str, Callable[..., None]] = {}


def register_engine(kind: str, *, check: Callable[..., None] | None = None) -> Callable:
    """Decorator: make `build(cfg, *, objective, mesh, device, ops) -> Engine` available as `engine: KIND`.

    `check(cfg, *, shape, device)` raises UserError for what can be known to be wrong before any rank starts, on a mesh of this MeshShape
    and a device of this kind; `build` is called with what has passed it.
    """

    def decorate(build: Callable[..., Engine]) -> Callable[..., Engine]:
        ENGINES[kind] = build
        CHECKS[kind] = check or (lambda *_, **__: None)
        return build

    return decorate


def check_engine(cfg, *, shape, device: str) -> None:
    """Raise UserError, before any rank starts, for an engine that is not there or does not run `cfg`."""
    kind = cfg.engine.kind
    if kind not in ENGINES:
        raise UserError(f"engine {kind!r} is not registered; allowed: {', '.join(sorted(ENGINES))}")
    if said := refusal(kind, device):
        raise UserError(said)
    CHECKS[kind](cfg, shape=shape, device=device)


def check_capabilities(engine: Engine, cfg) -> None:
    """Raise UserError naming the option that asks for what `engine` cannot do."""
    can, kind = engine.capabilities(), cfg.engine.kind
    for axis in ("pp", "dp_replicate", "dp_shard", "cp", "tp", "ep"):
        if getattr(cfg.parallel, axis) not in (1, -1) and axis not in can.axes:
            raise UserError(f"parallel.{axis} is {getattr(cfg.parallel, axis)}, but engine {kind} runs only {', '.join(can.axes)}")
    if cfg.precision.compute not in can.dtypes:
        raise UserError(f"precision.compute {cfg.precision.compute}: engine {kind} runs {', '.join(can.dtypes)}")
    if cfg.lora.rank and not can.adapters:
        raise UserError(f"lora.rank {cfg.lora.rank}: engine {kind} trains all weights; set lora.rank 0 or engine native")
    if not can.discard and "skip" in (cfg.guards.non_finite, cfg.guards.spike.action):
        raise UserError(f"engine {kind} cannot discard a step: set guards.non_finite to stop and guards.spike.action to count or off")
