"""The step plan: phases, ramps, schedules, data positions."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtrain.config.run import RunConfig
from llmtrain.config.train import ScheduleConfig
from llmtrain.errors import UserError
from llmtrain.layout.steps import StepPlan, learning_rate


def plan(**train):
    extra = train.pop("extra", {})
    return StepPlan.from_config(RunConfig.model_validate({"train": train, **extra}))


def test_a_run_without_phases_is_one_phase():
    p = plan(steps=10, seq_len=8, global_batch=4)
    assert (p.steps, p.tokens, len(p.phases)) == (10, 320, 1)
    assert p.step(3).first_sample == 12 and p.step(3).tokens_before == 96


def test_tokens_round_up_to_whole_steps():
    assert plan(tokens=321, seq_len=8, global_batch=4).steps == 11


def test_a_run_needs_a_length():
    with pytest.raises(UserError, match=r"train\.steps"):
        plan(seq_len=8)


PANGU = [
    {
        "tokens": 7_400_000_000_000,
        "seq_len": 4096,
        "rope_base": 1e4,
        "batch": [
            {"from_tokens": 0, "size": 1024},
            {"from_tokens": 1_200_000_000_000, "size": 1536},
            {"from_tokens": 1_900_000_000_000, "size": 2048},
        ],
        "schedule": {"kind": "cosine", "lr": 1e-4, "final_lr": 1e-5, "warmup_steps": 4000},
    },
    {"tokens": 4_600_000_000_000, "seq_len": 4096, "batch": 2048, "schedule": {"kind": "constant", "lr": 1e-5}},
    {
        "tokens": 800_000_000_000,
        "seq_len": 8192,
        "rope_base": 1e5,
        "batch": 1536,
        "schedule": {"kind": "cosine", "lr": 1e-5, "final_lr": 7.5e-6},
    },
]


def test_pangu_ultras_table():
    """Step counts of papers' section on the schedule: 286k + 111k + 656k = 1.05M, 548k, 64k."""
    p = plan(phases=PANGU)
    assert [round(s.steps / 1000) for s in p.segments] == [286, 111, 656, 548, 64]
    assert [s.batch for s in p.segments] == [1024, 1536, 2048, 2048, 1536]
    first, last = p.phases[0], p.step(p.steps - 1)
    assert p.step(0).lr == pytest.approx(1e-4 / 4000) and p.step(3999).lr == pytest.approx(1e-4)
    assert p.step(first.steps - 1).lr == pytest.approx(1e-5, rel=1e-3)
    assert p.step(first.steps).lr == 1e-5 and last.rope_base == 1e5 and last.lr == pytest.approx(7.5e-6, rel=1e-3)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 40), st.sampled_from([4, 8, 16]), st.integers(1, 5), st.integers(0, 300), st.integers(1, 9)),
        min_size=1,
        max_size=4,
    )
)
def test_positions_are_contiguous(phases):
    """Every sample of the run belongs to exactly one step, and tokens add up, whatever the phases and ramps."""
    configs = [
        {"steps": steps, "seq_len": seq, "batch": [{"from_tokens": 0, "size": size}, {"from_tokens": 1 + ramp, "size": later}]}
        for steps, seq, size, ramp, later in phases
    ]
    p = plan(phases=configs)
    sample = tokens = 0
    for index in range(p.steps):
        step = p.step(index)
        assert (step.first_sample, step.tokens_before) == (sample, tokens)
        assert step.phase.first_step <= index < step.phase.first_step + step.phase.steps
        sample, tokens = sample + step.batch, tokens + step.batch * step.seq_len
    assert tokens == p.tokens and sample == sum(phase.samples for phase in p.phases)


def test_wsd_is_flat_then_linear():
    schedule = ScheduleConfig(kind="wsd", final_lr=0.0, decay_fraction=0.25)
    rates = [learning_rate(schedule, peak=1.0, step=9, progress=x) for x in (0, 0.5, 0.75, 0.875, 1.0)]
    assert rates == pytest.approx([1, 1, 1, 0.5, 0])


def test_batches_must_split():
    with pytest.raises(UserError, match=r"6 sequences does not split over 2 data-parallel ranks x micro-batches of 2 = 4"):
        plan(steps=1, global_batch=6, micro_batch=2).check_batches(dp=2)
