"""Seconds of the parts of a model, and of the actions of a schedule that computes them."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

from llmtrain.layout import schedule_time
from llmtrain.layout.schedule import Schedule, Span, simulate
from llmtrain.layout.schedule_actions import Action, Value, need, product


@dataclass
class Times:
    """Seconds of one micro-batch in a part of the model, and what they are made of."""

    forward: float = 0.0
    inputs: float = 0.0
    weights: float = 0.0
    parts: Counter = field(default_factory=Counter)
    """Seconds by kind of work, forward and backward together."""

    def copy(self) -> "Times":
        """Another one with the same seconds."""
        return Times(self.forward, self.inputs, self.weights, self.parts.copy())

    def add(self, other: "Times", times: float = 1.0) -> None:
        """Add `times` the other."""
        self.forward += times * other.forward
        self.inputs += times * other.inputs
        self.weights += times * other.weights
        for name, value in other.parts.items():
            self.parts[name] += times * value

    @property
    def backward(self) -> float:
        """The whole backward pass."""
        return self.inputs + self.weights

    @property
    def both(self) -> float:
        """Forward and backward."""
        return self.forward + self.inputs + self.weights


@dataclass(frozen=True)
class StageTimes(schedule_time.Times):
    """Seconds of actions, each stage with its own."""

    each: Sequence[Times] = ()

    def of(self, action: Action) -> float:
        """Seconds of one action; of a pair those of both, whose sends are hidden already."""
        return sum(self._part(part) for part in action.flat())

    def _part(self, part: Action) -> float:
        one = self.each[part.stage]
        return {"F": one.forward, "B": one.backward, "I": one.inputs, "W": one.weights}[part.kind]


def run(schedule: Schedule, stages: Sequence[Times], transfer: float) -> tuple[tuple[Span, ...], ...]:
    """When each rank does what."""
    return simulate(schedule, StageTimes(each=stages, transfer=transfer))


class _Compiled(NamedTuple):
    """One action of a schedule, in an order in which everything that it waits for comes before it; -1 is nothing."""

    before: int
    """The rank's action before it."""
    first: int
    second: int
    """What makes its inputs; a pair has two."""
    far: bool
    """Whether these are on other ranks (of a pair, either)."""
    cost: tuple[tuple[str, int], ...]


@lru_cache(maxsize=256)
def _compiled(schedule: Schedule) -> list[_Compiled]:
    """Every action once, with numbers in place of names, so that many cases of one schedule are quick."""
    made: dict[Value, int] = {}
    last, at, found = [-1] * schedule.ranks, [0] * schedule.ranks, []
    moved = True
    while moved:
        moved = False
        for rank, actions in enumerate(schedule.actions):
            while at[rank] < len(actions):
                action = actions[at[rank]]
                needs = [value for part in action.flat() if (value := need(part, schedule.stages))]
                if any(value not in made for value in needs):
                    break
                inputs = [made[value] for value in needs] + [-1, -1]
                far = any(schedule.stage_rank(value.stage) != rank for value in needs)
                found.append(_Compiled(last[rank], *inputs[:2], far, tuple((part.kind, part.stage) for part in action.flat())))
                last[rank] = len(found) - 1
                made.update((value, last[rank]) for part in action.flat() if (value := product(part)))
                at[rank] += 1
                moved = True
    return found


def finished(schedule: Schedule, stages: Sequence[Times], transfer: float) -> float:
    """When the last rank is done."""
    costs = {("F", s): one.forward for s, one in enumerate(stages)} | {("B", s): one.backward for s, one in enumerate(stages)}
    costs |= {("I", s): one.inputs for s, one in enumerate(stages)} | {("W", s): one.weights for s, one in enumerate(stages)}
    ends: list[float] = []
    for before, first, second, far, parts in _compiled(schedule):
        start = ends[before] if before >= 0 else 0.0
        if first >= 0:
            ready = ends[first] if second < 0 else max(ends[first], ends[second])
            ready += transfer if far else 0.0
            start = max(start, ready)
        ends.append(start + (costs[parts[0]] if len(parts) == 1 else sum(costs[part] for part in parts)))
    return max(ends)
