"""Spike and finiteness guards."""

import json
import math
import random

import pytest

from llmtrain.config.train import SpikeConfig
from llmtrain.train.guards import GuardStop, SpikeDetector, check_finite


def steps(count: int, *, seed: int = 0) -> list[tuple[float, float]]:
    draw = random.Random(seed)
    return [(3 + draw.gauss(0, 0.1), 1 + draw.gauss(0, 0.05)) for _ in range(count)]


def test_the_rule_to_the_digit():
    detector = SpikeDetector(SpikeConfig(window=8, sigmas=2.0))
    for loss in (1.0, 3.0, 1.0, 3.0):  # mean 2, population std 1: the limit is 4
        assert not detector.judge(loss, 1.0).spike
    assert not detector.judge(4.0, 1.0).spike
    detector.load_state({"losses": [1.0, 3.0, 1.0, 3.0], "grad_norms": [1.0] * 4, "count": 0, "in_a_row": 0})
    verdict = detector.judge(4.0001, 1.0)
    assert verdict.spike and "loss 4" in verdict.reason and detector.count == 1


def test_gradient_norm_alone_is_enough():
    detector = SpikeDetector(SpikeConfig(window=16))
    for loss, norm in steps(16):
        assert not detector.judge(loss, norm).spike
    verdict = detector.judge(3.0, 50.0)
    assert verdict.spike and "gradient norm" in verdict.reason and "loss" not in verdict.reason


def test_nothing_is_judged_before_half_a_window():
    detector = SpikeDetector(SpikeConfig(window=16))
    for loss, norm in steps(7):
        detector.judge(loss, norm)
    assert not detector.judge(1000.0, 1000.0).spike
    other = SpikeDetector(SpikeConfig(window=16))
    for loss, norm in steps(8):
        other.judge(loss, norm)
    assert other.judge(1000.0, 1000.0).spike


def test_a_spike_is_not_absorbed():
    detector = SpikeDetector(SpikeConfig(window=32))
    for loss, norm in steps(32):
        detector.judge(loss, norm)
    before = detector.state()
    assert all(detector.judge(9.0, 1.0).spike for _ in range(5))
    after = detector.state()
    assert after["losses"] == before["losses"] and after["count"] == 5


def test_a_level_that_lasts_becomes_the_norm():
    detector = SpikeDetector(SpikeConfig(window=8))
    for loss, norm in steps(8):
        detector.judge(loss, norm)
    verdicts = [detector.judge(9.0 + loss, norm).spike for loss, norm in steps(20, seed=1)]
    assert verdicts == [True] * 4 + [False] * 16


def test_a_resumed_detector_judges_as_one_that_never_stopped():
    whole, run = SpikeDetector(SpikeConfig(window=16, sigmas=1.5)), steps(200, seed=2)
    expected = [whole.judge(*step) for step in run]
    first = SpikeDetector(SpikeConfig(window=16, sigmas=1.5))
    verdicts = [first.judge(*step) for step in run[:90]]
    second = SpikeDetector(SpikeConfig(window=16, sigmas=1.5))
    second.load_state(json.loads(json.dumps(first.state())))
    verdicts += [second.judge(*step) for step in run[90:]]
    assert verdicts == expected and second.state() == whole.state() and 5 < whole.count < 100


def test_off_looks_at_nothing():
    detector = SpikeDetector(SpikeConfig(action="off", window=8))
    assert not any(detector.judge(10.0**i, 1.0).spike for i in range(20)) and detector.count == 0


@pytest.mark.parametrize("loss, norm, named", [(math.nan, 1.0, "loss is nan"), (1.0, math.inf, "gradient norm is inf"), (1.0, 2.0, None)])
def test_check_finite(loss, norm, named):
    assert check_finite(loss, norm) == named


def test_guard_stop_names_samples():
    stop = GuardStop("step 3: loss is nan", samples=[5, 6])
    assert str(stop) == "step 3: loss is nan" and stop.samples == (5, 6)
