"""Closed form and event simulation of the same steps."""

import pytest

from llmtrain.config.model import ModelConfig
from llmtrain.hardware import load
from llmtrain.layout.schedule import build, simulate
from llmtrain.layout.schedule_time import Times as Plain
from llmtrain.simulate.actions import Times, finished
from llmtrain.simulate.case import Case
from llmtrain.simulate.events import replay
from llmtrain.simulate.published import read
from llmtrain.simulate.rates import Rates
from llmtrain.simulate.step import price

MODELS = {
    "dense": ModelConfig(preset="llama3_70b"),
    "experts": ModelConfig.model_validate({"preset": "deepseek_v3", "mtp": {"heads": 1}}),
}
KINDS = [
    ("gpipe", 1),
    ("1f1b", 1),
    ("interleaved", 2),
    ("interleaved", 3),
    ("zero_bubble", 1),
    ("zero_bubble", 2),
    ("zbv", 2),
    ("dualpipev", 2),
]


@pytest.mark.parametrize(("kind", "virtual"), KINDS)
@pytest.mark.parametrize("model", MODELS)
def test_closed_form_is_the_event_simulation(model, kind, virtual):
    for pp, micros in ((2, 4), (4, 9), (4, 16), (8, 16), (8, 33), (8, 64)):
        case = Case(model=MODELS[model], hardware=load("h100-80"), tp=4, pp=pp, virtual=virtual, micros=micros, schedule=kind, dp=8)
        case = case.with_(ep=8 if model == "experts" else 1, shard="zero1")
        closed, events = price(case, Rates()).seconds, replay(case, Rates()).step.seconds
        assert closed == pytest.approx(events, rel=0.02), f"pp {pp}, {micros} micro-batches"


def test_published_pipelines_agree():
    worst = {}
    for row in read():
        case = row.cases[0] if row.cases else None
        if case and case.pp > 1 and case.pp * case.virtual * case.micros <= 4000:
            worst[row.id] = price(case, Rates()).seconds / replay(case, Rates()).step.seconds - 1
    assert len(worst) > 25
    assert max(map(abs, worst.values())) < 0.02, worst


def test_compiled_lists_end_when_the_simulation_does():
    for kind, virtual in KINDS:
        schedule = build(kind, ranks=4, virtual_stages=virtual, micro_batches=12)
        ones = [Times(1.0, 1.0, 1.0)] * schedule.stages
        plain = max(rank[-1].end for rank in simulate(schedule, Plain(transfer=0.25)))
        assert finished(schedule, ones, 0.25) == pytest.approx(plain)


def test_a_transfer_is_waited_for():
    """Two ranks, one micro-batch: there and back once each."""
    schedule = build("1f1b", ranks=2, virtual_stages=1, micro_batches=1)
    assert max(rank[-1].end for rank in simulate(schedule, Plain(transfer=0.5))) == 2 * 3 + 2 * 0.5
