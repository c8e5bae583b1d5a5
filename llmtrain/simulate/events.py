"""The time of a step event by event: the action lists that `parallel/` carries out, with the closed form's times of stages and sends."""

from dataclasses import dataclass

from llmtrain.layout.schedule import Schedule, Span, build
from llmtrain.simulate import actions
from llmtrain.simulate.case import Case
from llmtrain.simulate.pricer import Pricer
from llmtrain.simulate.rates import Rates
from llmtrain.simulate.step import Step, finish


@dataclass(frozen=True)
class Simulated:
    """A step, and when each rank of the pipeline does what."""

    step: Step
    schedule: Schedule
    spans: tuple[tuple[Span, ...], ...]


def replay(case: Case, rates: Rates) -> Simulated:
    """The step of `case` by its schedule's actions. Raises UserError for a schedule that cannot serve it."""
    pricer = Pricer(case, rates)
    stages, transfer = pricer.stages(), pricer.transfer()
    schedule = build(case.kind, ranks=case.pp, virtual_stages=case.virtual, micro_batches=case.micros, pairs=case.overlap_micro_batches)
    spans = actions.run(schedule, stages, transfer)
    busy = [sum(span.end - span.start for span in rank) for rank in spans]
    end = max(rank[-1].end for rank in spans)
    slowest = max(range(case.pp), key=busy.__getitem__)
    found = finish(pricer, stages, transfer, pipeline=end, busy=sum(busy) / case.pp, slowest=slowest)
    return Simulated(found, schedule, spans)
