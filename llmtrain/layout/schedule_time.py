"""When each action of a schedule runs, by event simulation: bubble, memory, picture."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

from llmtrain.layout.schedule_actions import Action, Schedule, Value, need, product


@dataclass(frozen=True)
class Times:
    """How long actions take, in any one unit.

    `weights` is the part of a backward that W takes (I the rest), half if None; `overlapped` what a pair takes, the sum of both if
    None; `stages` multiplies the times of each stage, 1 if None; `transfer` is what a value takes from rank to rank.
    """

    forward: float = 1.0
    backward: float = 2.0
    weights: float | None = None
    overlapped: float | None = None
    stages: Sequence[float] | None = None
    transfer: float = 0.0

    def of(self, action: Action) -> float:
        """Time of one action."""
        if action.parts and self.overlapped is not None:
            return self.overlapped * sum(self._scale(part.stage) for part in action.parts) / len(action.parts)
        return sum(self._of_kind(part.kind) * self._scale(part.stage) for part in action.flat())

    def _scale(self, stage: int) -> float:
        return 1.0 if self.stages is None else self.stages[stage]

    def _of_kind(self, kind: str) -> float:
        weights = self.backward / 2 if self.weights is None else self.weights
        return {"F": self.forward, "B": self.backward, "I": self.backward - weights, "W": weights}[kind]


class Span(NamedTuple):
    """An action and when it runs."""

    action: Action
    start: float
    end: float


def simulate(schedule: Schedule, times: Times = Times()) -> tuple[tuple[Span, ...], ...]:
    """When each action of each rank runs if every rank does its list in order, as soon as what an action needs exists.

    Raises:
        ValueError: the lists wait for each other, or `times.stages` has not one entry per stage.
    """
    if times.stages is not None and len(times.stages) != schedule.stages:
        raise ValueError(f"stage costs: {len(times.stages)} given for {schedule.stages} stages")
    ready: dict[Value, float] = {}
    spans: list[list[Span]] = [[] for _ in range(schedule.ranks)]
    moved = True
    while moved:
        moved = False
        for rank, actions in enumerate(schedule.actions):
            while len(spans[rank]) < len(actions) and _advance(actions[len(spans[rank])], spans[rank], ready, schedule, times):
                moved = True
    stuck = [str(actions[len(done)]) for actions, done in zip(schedule.actions, spans) if len(done) < len(actions)]
    if stuck:
        raise ValueError(f"schedule {schedule.kind} never ends: {', '.join(stuck)} wait for each other")
    return tuple(map(tuple, spans))


def _advance(action: Action, spans: list[Span], ready: dict[Value, float], schedule: Schedule, times: Times) -> bool:
    """Add the span of `action` unless what it needs does not exist yet."""
    needed = [value for part in action.flat() if (value := need(part, schedule.stages))]
    if any(value not in ready for value in needed):
        return False
    start = max([spans[-1].end if spans else 0.0, *(ready[value] for value in needed)])
    spans.append(Span(action, start, start + times.of(action)))
    ready.update((value, spans[-1].end + _way(value, schedule, times)) for part in action.flat() if (value := product(part)))
    return True


def _way(value: Value, schedule: Schedule, times: Times) -> float:
    """How long `value` takes to the stage that needs it."""
    user = value.stage + (1 if value.kind == "F" else -1)
    if not times.transfer or not 0 <= user < schedule.stages:
        return 0.0
    return times.transfer if schedule.stage_rank(user) != schedule.stage_rank(value.stage) else 0.0


def bubble(
    schedule: Schedule,
    *,
    forward: float = 1.0,
    backward: float = 2.0,
    weights: float | None = None,
    overlapped: float | None = None,
    stage_costs: Sequence[float] | None = None,
) -> float:
    """Share of the ranks' time in which they wait for each other, from 0 to 1: 1 - computing / (ranks x time from first to last action).

    Without communication. With equal stages 1F1B gives (p - 1) / (p - 1 + n), and v interleaved stages (p - 1) / (p - 1 + n v).

    Args:
        schedule: what the ranks do.
        forward: time of a forward at one stage.
        backward: time of a whole backward.
        weights: the part of it that is for weights; half if not given.
        overlapped: time of a pair that overlaps; forward + backward if not given.
        stage_costs: factor per stage, for uneven stages.
    """
    times = Times(forward, backward, weights, overlapped, stage_costs)
    spans = simulate(schedule, times)
    busy = sum(span.end - span.start for rank in spans for span in rank)
    return 1 - busy / (schedule.ranks * max(rank[-1].end for rank in spans))


def peak_activations(schedule: Schedule) -> tuple[int, ...]:
    """Per rank, the most (stage, micro-batch) whose activations exist at once: from F until the end of B or W."""
    change = {"F": 1, "B": -1, "W": -1, "I": 0}
    return tuple(max(accumulate(change[part.kind] for action in rank for part in action.flat())) for rank in schedule.actions)


def draw(schedule: Schedule) -> str:
    """A picture of `schedule`: a line per rank, a column per unit of time; F, I and W take one, B two.

    A cell is F0 (forward of micro-batch 0), or 2F0 if ranks hold several stages; `-` continues a backward, `.` is idle, `+` joins the
    halves of a pair that may overlap.
    """
    lines = [_cells(spans, name_stage=schedule.stages > schedule.ranks) for spans in simulate(schedule)]
    columns, width = max(map(len, lines)), max(len(cell) for line in lines for cell in line)
    return "\n".join(
        f"rank {rank}  " + " ".join(cell.ljust(width) for cell in line + ["."] * (columns - len(line))).rstrip()
        for rank, line in enumerate(lines)
    )


def _cells(spans: Sequence[Span], *, name_stage: bool) -> list[str]:
    cells: list[str] = []
    for span in spans:
        cells += ["."] * (round(span.start) - len(cells))
        for index, part in enumerate(span.action.flat()):
            name = str(part) if name_stage else f"{part.kind}{part.micro_batch}"
            cells += ["+" * index + name, *(["-"] if part.kind == "B" else [])]
    return cells
