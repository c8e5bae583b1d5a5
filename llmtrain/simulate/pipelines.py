"""How a pipeline puts the times of its stages together, in closed form."""

from functools import lru_cache

from llmtrain.layout.schedule import build
from llmtrain.simulate.actions import Times, finished
from llmtrain.simulate.case import Case


def _uneven(stages: tuple[Times, ...]) -> bool:
    """Whether stages differ that are not the last: then ranks that are at different ones wait for each other in every round."""
    costs = [one.both for one in stages[:-1]]
    return max(costs) > 1.05 * min(costs)


@lru_cache(maxsize=4096)
def _rounds(p: int, v: int, n: int, profile: tuple[tuple[float, float], ...], transfer: float, pairs: bool) -> float:
    """The time of an interleaved schedule by its lists for four and five rounds of micro-batches; each further one as much again."""
    stages = [Times(forward, backward) for forward, backward in profile]
    few = 4 * p + n % p
    short, longer = (
        finished(build("interleaved", ranks=p, virtual_stages=v, micro_batches=count, pairs=pairs), stages, transfer)
        for count in (few, few + p)
    )
    return longer + (n - few - p) * (longer - short) / p


@lru_cache(maxsize=4096)
def _listed(kind: str, p: int, v: int, n: int, profile: tuple[tuple[float, float, float], ...], transfer: float, pairs: bool) -> float:
    """The time of a schedule by its lists."""
    schedule = build(kind, ranks=p, virtual_stages=v, micro_batches=n, pairs=pairs)
    return finished(schedule, [Times(*one) for one in profile], transfer)


def _round_trip(loads: list[float], transfer: float) -> float:
    """What the sends of 1F1B leave at least for each micro-batch: from stage i on there are as many of them as stages, and each goes to the
    last stage and back before the one after all of these starts."""
    p = len(loads)
    return max((sum(loads[i:]) + 2 * (p - 1 - i) * transfer) / (p - i) for i in range(p))


def pipeline_seconds(case: Case, stages: tuple[Times, ...], ranks: list[tuple[int, ...]], transfer: float) -> float:
    """From the first forward to the last backward, by the shape of each schedule.

    Schedules that split backward passes, and rounds that are too few to hide an uneven stage, have no formula that is near enough: their
    lists are run for few micro-batches, and those left over take the slowest rank's time.
    """
    loads = [sum(stages[s].both for s in own) for own in ranks]
    if case.pp == 1:
        return case.micros * loads[0]
    p, v, n, worst = case.pp, case.virtual, case.micros, max(loads)
    sends = 2 * (p * v - 1) * transfer
    if case.kind == "gpipe":
        return n * worst + (p - 1) * sum(loads) / p + sends
    if case.kind == "1f1b":
        return (n - 1) * max(worst, _round_trip(loads, transfer)) + sum(loads) + sends
    if case.kind == "interleaved" and n >= 3 * p and not _uneven(stages):
        return (n - 1) * worst + sum(loads) / v + worst * (1 - 1 / v) + sends
    if case.kind == "interleaved" and n > 5 * p:
        unit = sum(loads) / case.stages
        profile = tuple((round(one.forward / unit, 2), round(one.backward / unit, 2)) for one in stages)
        rounded = max(sum(sum(profile[s]) for s in own) for own in ranks)
        return worst / rounded * _rounds(p, v, n, profile, round(transfer / unit, 3), case.overlap_micro_batches)
    few = n if n <= (5 if case.kind == "interleaved" else 4) * p else 3 * p + n % p
    unit = sum(loads) / case.stages
    profile = tuple((round(one.forward / unit, 2), round(one.inputs / unit, 2), round(one.weights / unit, 2)) for one in stages)
    pairs = case.overlap_micro_batches
    rounded = max(sum(sum(profile[s]) for s in own) for own in ranks)
    return worst / rounded * _listed(case.kind, p, v, few, profile, round(transfer / unit, 3), pairs) + (n - few) * worst
