"""Which collective a device is held up in: the first that its rank has begun and another rank has not. Imports no torch.

An asynchronous device works off what its host has begun, so the host is known to wait, and not for what. All ranks count the collectives
of each group in one order, and remember those that they do not know to be finished; a rank that has begun fewer than another is the one
that the other waits for.
"""

from typing import NamedTuple

from llmtrain.parallel.hang.record import DEVICE, DIRECTIONS, Record


class Step(NamedTuple):
    """A collective that a rank has begun."""

    key: str
    """What it is counted under: the group, or a pair of ranks."""
    number: int
    op: str
    group: str
    peer: int
    layer: str | None
    direction: str | None
    micro_batch: int


def begun_by(record: Record) -> list[Step]:
    """What this rank has begun and does not know to be finished, oldest first."""
    names, left, steps = record.names(), {}, []
    for place, op, group, peer, layer, direction, micro_batch in reversed(tuple(record.begun)):
        if place:
            left[place] = number = left.get(place, record.slots[place] + 1) - 1
            where = names[layer] or None, DIRECTIONS.get(direction), micro_batch
            steps.append(Step(names[record.slots[place - 1]], number, names[op], names[group], peer, *where))
    return steps[::-1]


def settle(reports: dict[int, dict]) -> dict[int, dict]:
    """`reports` as `Watch` makes them, by rank, with a collective in the place of every wait for a device.

    Where no rank is behind, as when a link is broken, that is the last one begun.
    """
    return {rank: _settled(report, reports) for rank, report in reports.items()}


def _settled(report: dict, reports: dict[int, dict]) -> dict:
    steps = [Step(*step) for step in report.get("begun", ())] if report.get("op") == DEVICE else []
    if not steps:
        return report
    missed = (step for step in steps if any(_behind(reports[rank], step) for rank in _members(step, report) or reports if rank in reports))
    step = next(missed, steps[-1])
    found = {"op": step.op, "group": step.group, "peer": step.peer, "members": _members(step, report), "sequence": step.number}
    return report | found | {"layer": step.layer, "direction": step.direction, "micro_batch": step.micro_batch}


def _members(step: Step, report: dict) -> list[int] | None:
    """The ranks that have to begin it; None for all."""
    return sorted((report["rank"], step.peer)) if step.peer >= 0 else report["groups"].get(step.group)


def _behind(report: dict, step: Step) -> bool:
    """Whether a rank, as far as it is known, has yet to begin `step`."""
    return "counts" in report and report["counts"].get(step.key, 0) < step.number
