"""The time of a step in closed form: its stages put together, and what comes before and after them."""

import math
from collections import Counter
from dataclasses import dataclass

from llmtrain.simulate.actions import Times
from llmtrain.simulate.case import Case
from llmtrain.simulate.held import rank_held, stages_of
from llmtrain.simulate.pipelines import pipeline_seconds
from llmtrain.simulate.pricer import Pricer
from llmtrain.simulate.rates import Rates


@dataclass(frozen=True)
class Step:
    """A step's time and what it consists of."""

    seconds: float
    parts: dict[str, float]
    """Seconds by cause; they add up to `seconds`."""
    stages: tuple[Times, ...]
    transfer: float
    """Seconds that an activation takes from stage to stage."""
    bubble: float
    """Share of the pipeline's time in which its ranks wait, on average."""


def price(case: Case, rates: Rates, known: dict[tuple, Times] | None = None) -> Step:
    """The time of a step of `case` in closed form. `known` keeps parts for other cases of one model, machine and framework."""
    pricer = Pricer(case, rates, known)
    stages, transfer = pricer.stages(), pricer.transfer()
    ranks = [stages_of(case, rank) for rank in range(case.pp)]
    busy = [case.micros * sum(stages[s].both for s in own) for own in ranks]
    pipeline = pipeline_seconds(case, stages, ranks, transfer)
    slowest = max(range(case.pp), key=busy.__getitem__)
    return finish(pricer, stages, transfer, pipeline=pipeline, busy=sum(busy) / case.pp, slowest=slowest)


def finish(pricer: Pricer, stages: tuple[Times, ...], transfer: float, *, pipeline: float, busy: float, slowest: int) -> Step:
    """What `pipeline` seconds of computing, of which ranks are `busy` on average, become with all that is outside."""
    case, rates = pricer.case, pricer.rates
    mates = pricer.machine.shared * case.pp / case.devices  # stages that share a core, where one computes while the other waits
    if mates > 1:
        pipeline = max(pipeline / mates, busy)
    exposed, update = _outside(pricer, stages)
    parts: Counter = Counter()
    for stage in stages_of(case, slowest):
        for name, value in stages[stage].parts.items():
            parts[name] += case.micros * value
    inside = sum(parts.values())
    if pipeline < inside:
        parts = Counter({name: value * pipeline / inside for name, value in parts.items()})
    parts["bubble"] = max(0.0, pipeline - inside)
    parts["gradient reduction"], parts["optimizer"], parts["outside"] = exposed, update, rates.step
    before = sum(parts.values())
    parts["stragglers"] = before * rates.straggle * (math.log2(case.dp) if case.nodes > 1 else 0.0)
    return Step(before + parts["stragglers"], dict(parts), stages, transfer, max(0.0, 1 - busy / pipeline))


def _outside(pricer: Pricer, stages: tuple[Times, ...]) -> tuple[float, float]:
    """Seconds of gradient reduction that show, and of the update, on the rank where they are most."""
    case, worst = pricer.case, (0.0, 0.0)
    for rank in {0, case.pp - 1}:
        held, own = rank_held(case, rank), stages_of(case, rank)
        # Of the stages that a rank holds, all but one are done before the last round of micro-batches is, and start after it has begun.
        rounds = 1 + (min(case.micros, case.pp) - 1) * (1 - 1 / case.virtual)
        reduce, gather = pricer.reduction(held)
        if case.habits.dp_hidden:  # gradients beside the backward pass, parameters beside the next forward pass
            reduce = _shown(reduce, rounds * sum(stages[s].backward for s in own), pricer.dp_hidden)
            gather = _shown(gather, rounds * sum(stages[s].forward for s in own), pricer.dp_hidden)
        worst = max(worst, (reduce + gather, pricer.update(held)), key=sum)
    return worst


def _shown(sending: float, window: float, hidden: float) -> float:
    """What of `sending` is not beside computing."""
    return max(sending * (1 - hidden), sending - window)
