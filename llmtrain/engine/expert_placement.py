"""Experts that move between the ranks of ep, with their optimizer state, so that all ranks get about as many tokens."""

import time
from dataclasses import dataclass, field
from statistics import fmean

import torch
from torch import Tensor

from llmtrain.config.run import RunConfig
from llmtrain.engine.expert_usage import ExpertUsage
from llmtrain.engine.local_optimizer import LocalOptimizer
from llmtrain.engine.stages import Stages
from llmtrain.layout.placement import Plan, Planner, device_loads, home, route
from llmtrain.parallel.ep_placed import move_rows, place_by_table
from llmtrain.parallel.fsdp import local_tensor, release_gathered
from llmtrain.parallel.hang import where
from llmtrain.parallel.mesh import Mesh


def build_placement(cfg: RunConfig, *, stages: Stages, optimizer: LocalOptimizer, mesh: Mesh) -> "ExpertPlacement | None":
    """What `parallel.expert_placement` asks for; None without it, and where there is nowhere to move to."""
    if cfg.parallel.expert_placement is None or stages.usage is None or mesh.shape.ep == 1:
        return None
    return ExpertPlacement(cfg, stages=stages, optimizer=optimizer, mesh=mesh)


@dataclass(frozen=True)
class _Layer:
    """A mixture of experts of this rank."""

    table: Tensor
    """As of `place_by_table`."""
    names: list[str]
    """Its stacks of experts among the parameters."""


@dataclass(frozen=True)
class Settled:
    """What bringing the experts to their places has to tell."""

    metrics: dict[str, float] = field(default_factory=dict)
    """`move_seconds`, if any moved."""
    events: tuple[str, ...] = ()
    """New plans, in words."""


class ExpertPlacement:
    """Checks now and then where experts should be (`layout.placement.Planner`) and moves them there before a step.

    Experts are at home, in the order of their numbers, while anybody looks at the engine's state: `go_home` brings them there in place,
    and the next `settle` back. So a checkpoint never depends on where they were. Gradients do not move: there must be none.
    """

    def __init__(self, cfg: RunConfig, *, stages: Stages, optimizer: LocalOptimizer, mesh: Mesh):
        self.usage: ExpertUsage = stages.usage
        self.stages, self.optimizer, self.mesh = stages, optimizer, mesh
        experts = self.usage.ffn.experts
        self.planner = Planner(cfg.parallel.expert_placement, layers=self.usage.layers, experts=experts, devices=mesh.shape.ep)
        self._standing = [home(experts) for _ in range(self.usage.layers)]
        self._layers = {number: self._layer(number) for number in self.usage.modules}
        axes = ("ep", "efsdp") if mesh.shape.efsdp > 1 else ("ep",)
        self._groups = [mesh.experts.get_group(axis) for axis in axes]

    def _layer(self, number: int) -> _Layer:
        name, layer = self.usage.modules[number]
        return _Layer(place_by_table(layer), [stack for stack in self.stages.parameters if stack.startswith(f"{name}.experts.")])

    def settle(self) -> Settled:
        """Before a step: check, if it is time to, and bring the experts to where they are to be."""
        where.at(phase="placing experts")
        plans, start = self.planner.check(), time.perf_counter()
        moved = self._bring(self.planner.slots)
        seconds = time.perf_counter() - start
        where.at(phase="training")
        if not moved:
            return Settled()
        return Settled({"move_seconds": seconds}, (self._told(plans, seconds),) if plans else ())

    def go_home(self) -> None:
        """Bring all experts to the slots of their own numbers."""
        self._bring([home(len(slots)) for slots in self._standing])

    def add(self) -> None:
        """Take the tokens of the step that `usage` has just summed up into the averages."""
        self.planner.add(self._counts())

    def metrics(self) -> dict[str, list[float]]:
        """Of the last step by layer: `rank_load`, tokens of the rank of ep with the most over the mean."""
        tokens = [device_loads(counts, slots, self.planner.devices) for counts, slots in zip(self._counts(), self._standing)]
        return {"rank_load": [round(max(its) * len(its) / max(1.0, sum(its)), 6) for its in tokens]}

    def _counts(self) -> list[list[int]]:
        return self.usage.totals[:, :-1].tolist()

    def _bring(self, wanted: list[list[int]]) -> bool:
        """Whether any experts had to move."""
        moving = [number for number, slots in enumerate(wanted) if slots != self._standing[number]]
        if not moving:
            return False
        if any(parameter.grad is not None for parameter in self.optimizer.parameters.values()):
            raise RuntimeError("experts cannot move while there are gradients: call apply or discard first")
        for part in self.stages.parts.values():
            release_gathered(part)
        moments = self.optimizer.moments
        for number in moving:
            if number in self._layers:
                self._move(number, wanted[number], moments)
            self._standing[number] = list(wanted[number])
        self.mesh.device.synchronize()
        return True

    def _move(self, number: int, slots: list[int], moments: dict[str, tuple[Tensor, Tensor]]) -> None:
        shape, experts, layer = self.mesh.shape, self.mesh.experts, self._layers[number]
        device, shard = (experts.get_local_rank(axis) for axis in ("ep", "efsdp"))
        way = route(self._standing[number], slots, devices=shape.ep, shards=shape.efsdp, device=device, shard=shard)
        for name in layer.names:
            for stack in (local_tensor(self.stages.parameters[name].detach()), *moments[name]):
                there = stack.to(self.mesh.device.torch_device)  # moments may be on the host
                move_rows(there, way, self._groups)
                if there is not stack:
                    stack.copy_(there)
        layer.table[:-1].copy_(torch.tensor(slots))

    def _told(self, plans: dict[int, Plan], seconds: float) -> str:
        best = max(plans, key=lambda number: (plans[number].before - plans[number].after, -number))
        first = self.usage.ffn.dense_layers
        before, after = (fmean(getattr(plan, name) for plan in plans.values()) for name in ("before", "after"))
        text = (
            f"experts of {len(plans)} of {self.usage.layers} layers moved in {seconds:.2f} s, not counted as training: std / mean of the "
        )
        text += f"ranks' tokens {before:.3f} -> {after:.3f}"
        most = plans[best]
        return text + (f" on average, most in layer {best + first}: {most.before:.3f} -> {most.after:.3f}" if len(plans) > 1 else "")

    def state(self) -> dict:
        """JSON-able, the same on every rank."""
        return self.planner.state()

    def load_state(self, state: dict) -> None:
        """Take over state(); experts move to its slots before the next step."""
        self.planner.load_state(state)
