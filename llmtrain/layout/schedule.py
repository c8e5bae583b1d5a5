"""Pipeline schedules as lists of actions: who computes what when, and what is sent between.

`build` gives every rank's compute actions, `with_communication` adds sends and receives; `parallel/pipeline.py` carries them out.
"""

from functools import lru_cache
from typing import NamedTuple

from llmtrain.errors import UserError
from llmtrain.layout import schedule_orders as orders
from llmtrain.layout.schedule_actions import Action, Placement, Schedule, Value, need, product, stage_rank
from llmtrain.layout.schedule_time import Span, Times, bubble, draw, peak_activations, simulate

__all__ = [
    "KINDS",
    "Action",
    "Schedule",
    "Span",
    "Times",
    "bubble",
    "build",
    "draw",
    "forward_only",
    "peak_activations",
    "placement_of",
    "resolve",
    "simulate",
    "stage_rank",
    "with_communication",
]

_ORDERS = {
    "gpipe": orders.gpipe,
    "1f1b": orders.one_f_one_b,
    "interleaved": orders.interleaved,
    "zero_bubble": orders.zero_bubble,
    "zbv": orders.zbv,
    "dualpipev": orders.dualpipev,
}
_PAIRS = {"dualpipev": orders.dualpipev, "interleaved": orders.interleaved_pairs}
KINDS = tuple(_ORDERS)


def resolve(kind: str, virtual_stages: int) -> str:
    """What parallel.schedule `kind` stands for: `auto` is 1f1b, or interleaved if ranks hold several stages."""
    return ("1f1b" if virtual_stages == 1 else "interleaved") if kind == "auto" else kind


def placement_of(kind: str) -> Placement:
    """How `kind` lays stages over ranks: `loop`, stage s on rank s mod p, or `v`, rank r holds r and 2p - 1 - r."""
    return "v" if kind in ("zbv", "dualpipev") else "loop"


@lru_cache(maxsize=64)
def build(kind: str, *, ranks: int, virtual_stages: int, micro_batches: int, pairs: bool = False) -> Schedule:
    """The compute actions of every rank.

    Args:
        kind: parallel.schedule: `auto` or one of KINDS.
        ranks: ranks along pp.
        virtual_stages: stages per rank.
        micro_batches: micro-batches per optimizer step that pass through one pipeline.
        pairs: let a forward and a backward come in pairs that may overlap (parallel.overlap_micro_batches).

    Raises:
        UserError: the combination has no such schedule; names the options to change.
    """
    kind = resolve(kind, virtual_stages)
    if kind not in _ORDERS:
        raise UserError(f"parallel.schedule {kind!r} is unknown; allowed are auto, {', '.join(KINDS)}")
    _check(kind, ranks=ranks, virtual_stages=virtual_stages, micro_batches=micro_batches)
    if pairs and kind not in _PAIRS:
        raise UserError(
            f"parallel.overlap_micro_batches: schedule {kind} has no pairs of a forward and a backward; set parallel.schedule to "
            f"{' or '.join(_PAIRS)} (with parallel.virtual_stages 2 or more), or overlap_micro_batches to false"
        )
    order = (_PAIRS if pairs else _ORDERS)[kind]
    actions = tuple(tuple(order(rank, ranks, virtual_stages, micro_batches)) for rank in range(ranks))
    return Schedule(kind, ranks, ranks * virtual_stages, micro_batches, placement_of(kind), actions)


def _check(kind: str, *, ranks: int, virtual_stages: int, micro_batches: int) -> None:
    given = f"parallel.schedule {kind} with parallel.virtual_stages {virtual_stages}"
    if min(ranks, virtual_stages, micro_batches) < 1:
        raise UserError(f"{given}, parallel.pp {ranks} and {micro_batches} micro-batches: each must be at least 1")
    if kind == "1f1b" and virtual_stages != 1:
        raise UserError(f"{given}: 1f1b has one stage per rank; set parallel.virtual_stages to 1 or parallel.schedule to interleaved")
    if kind == "interleaved" and virtual_stages == 1:
        raise UserError(f"{given}: there is nothing to interleave; set parallel.virtual_stages to 2 or more or parallel.schedule to 1f1b")
    if placement_of(kind) == "v" and virtual_stages != 2:
        raise UserError(f"{given}: a V has two stages per rank, one down and one up; set parallel.virtual_stages to 2")
    if kind == "dualpipev" and micro_batches < 2 * ranks:
        raise UserError(
            f"parallel.schedule dualpipev needs 2 x parallel.pp = 2 x {ranks} = {2 * ranks} micro-batches per step, "
            f"train.global_batch / (train.micro_batch x dp) gives {micro_batches}; "
            "raise train.global_batch, lower train.micro_batch, or set parallel.schedule to zbv"
        )


@lru_cache(maxsize=64)
def forward_only(schedule: Schedule, *, micro_batches: int | None = None) -> Schedule:
    """Forwards alone over the same stages, for evaluation and generation; any number of micro-batches, the schedule's own if None."""
    count, ranks = schedule.micro_batches if micro_batches is None else micro_batches, range(schedule.ranks)
    actions = tuple(tuple(orders.forwards(schedule.stages_of(rank), schedule.ranks, count)) for rank in ranks)
    return Schedule("forward_only", schedule.ranks, schedule.stages, count, schedule.placement, actions)


class _Transfer(NamedTuple):
    """A value that goes from one rank to another; sorting gives the order in which all ranks see transfers."""

    end: float
    value: Value
    source: int
    target: int

    @property
    def send(self) -> Action:
        return Action(f"SEND_{self.value.kind}", self.value.stage, self.value.micro_batch)

    @property
    def receive(self) -> Action:
        step = 1 if self.value.kind == "F" else -1
        return Action(f"RECV_{self.value.kind}", self.value.stage + step, self.value.micro_batch)


@lru_cache(maxsize=64)
def with_communication(schedule: Schedule) -> tuple[tuple[Action, ...], ...]:
    """Every rank's actions with the transfers between: SEND right after what makes a value, RECV before what needs it.

    All transfers have one order, by the time at which an event simulation makes their values, and every rank has its own in this order,
    sends and receives, whatever the peer. So transfers match without tags, and nothing waits for ever even if a transfer occupies both
    ranks until it is done, as on a back end with one stream. Within that order a RECV comes as late as it can. A rank may
    start a receive at its RECV and wait for it at the action that needs it. Neighbouring stages of one rank exchange nothing.
    """
    transfers = _transfers(schedule)
    made = {transfer.value: transfer for transfer in transfers}
    return tuple(
        _with_transfers(actions, made, [t for t in transfers if t.target == rank], schedule)
        for rank, actions in enumerate(schedule.actions)
    )


def _transfers(schedule: Schedule) -> list[_Transfer]:
    found = []
    for rank, spans in enumerate(simulate(schedule)):
        for span in spans:
            for value in filter(None, map(product, span.action.flat())):
                user = value.stage + (1 if value.kind == "F" else -1)
                if 0 <= user < schedule.stages and schedule.stage_rank(user) != rank:
                    found.append(_Transfer(span.end, value, rank, schedule.stage_rank(user)))
    return sorted(found)


def _with_transfers(
    actions: tuple[Action, ...], made: dict[Value, _Transfer], incoming: list[_Transfer], schedule: Schedule
) -> tuple[Action, ...]:
    """One rank's list. `incoming` are the transfers to it, in order."""
    out: list[Action] = []
    received = 0
    for action in actions:
        needs = [made[value] for part in action.flat() if (value := need(part, schedule.stages)) in made]
        while needs and received < len(incoming) and incoming[received] <= max(needs):
            out.append(incoming[received].receive)
            received += 1
        out.append(action)
        for transfer in sorted(made[value] for part in action.flat() if (value := product(part)) in made):
            while received < len(incoming) and incoming[received] < transfer:
                out.append(incoming[received].receive)
                received += 1
            out.append(transfer.send)
    return tuple(out)
