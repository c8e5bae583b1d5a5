"""Sinks and the speed meter."""

import json
import math
import sys
from types import SimpleNamespace

import pytest

from llmtrain.config.train import MetricsConfig
from llmtrain.errors import UserError
from llmtrain.train.metrics import JsonlSink, SpeedMeter, build_sinks, read_metrics

TRAIN = {"kind": "train", "loss": 2.5, "grad_norm": math.nan, "lr": 1e-3, "samples": [8, 4], "mfu": None}


def test_a_line_is_valid_json_at_once_and_comes_back(tmp_path):
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    sink.write(3, TRAIN)
    sink.write(3, {"kind": "validation", "source": "plays", "loss": math.inf})
    text = (tmp_path / "metrics.jsonl").read_text()

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    first, second = (json.loads(line, parse_constant=refuse) for line in text.splitlines())
    assert first["grad_norm"] == "NaN" and second["loss"] == "Infinity" and (first["kind"], first["step"]) == ("train", 3)
    back = read_metrics(tmp_path / "metrics.jsonl")
    assert math.isnan(back[0]["grad_norm"]) and back[1]["loss"] == math.inf and back[0]["samples"] == [8, 4]


def test_text_with_line_separators_is_one_line(tmp_path):
    sink, text = JsonlSink(tmp_path / "metrics.jsonl"), "a\u2028b\x85c\x0cd\re\nf"
    sink.write(1, {"kind": "sample", "text": text})
    sink.write(2, TRAIN)
    assert [line.get("text") for line in read_metrics(tmp_path / "metrics.jsonl")] == [text, None]


def test_numbers_survive_exactly(tmp_path):
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    sink.write(1, {"kind": "train", "loss": 0.1 + 0.2})
    assert read_metrics(tmp_path / "metrics.jsonl")[0]["loss"] == 0.1 + 0.2


def test_a_line_cut_by_a_crash_does_not_spoil_the_next(tmp_path):
    path = tmp_path / "metrics.jsonl"
    JsonlSink(path).write(1, TRAIN)
    with open(path, "a") as file:
        file.write('{"kind": "tra')
    assert len(read_metrics(path)) == 1
    JsonlSink(path).write(2, TRAIN)
    assert [line["step"] for line in read_metrics(path)] == [1, 2]


def test_a_broken_line_in_the_middle_is_an_error(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"a": 1}\n{"a"\n{"a": 2}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl:2"):
        read_metrics(path)


def test_tensorboard_has_the_numbers(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sinks = build_sinks(MetricsConfig(tensorboard=True), tmp_path, {})
    for sink in sinks:
        sink.write(3, TRAIN)
        sink.write(4, {"kind": "validation", "source": "plays", "loss": 1.5})
        sink.write(4, {"kind": "event", "text": "saved"})
        sink.close()
    events = EventAccumulator(str(tmp_path / "tb")).Reload()
    assert {"train/loss", "train/lr", "validation/plays"} <= set(events.Tags()["scalars"])
    assert [(e.step, e.value) for e in events.Scalars("validation/plays")] == [(4, 1.5)]
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 3


@pytest.mark.parametrize("option", ["tensorboard", "wandb", "swanlab"])
def test_a_missing_package_is_named_with_its_option(tmp_path, monkeypatch, option):
    monkeypatch.setitem(sys.modules, option, None)
    with pytest.raises(UserError, match=rf"metrics\.{option} .*pip install llmtrain\[") as error:
        build_sinks(MetricsConfig(**{option: True if option == "tensorboard" else "project"}), tmp_path, {})
    assert "\n" not in str(error.value)


def test_wandb_gets_scalars_and_the_same_run_after_a_resume(tmp_path, monkeypatch):
    calls = []
    fake = SimpleNamespace(
        api=SimpleNamespace(api_key=None),
        init=lambda **options: calls.append(options),
        log=lambda values, step: calls.append((step, values)),
        finish=lambda: calls.append("finished"),
    )
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    said = []
    for _ in range(2):
        sink = build_sinks(MetricsConfig(wandb="project"), tmp_path, {"name": "run"}, say=said.append)[1]
        sink.write(3, TRAIN)
        sink.write(3, {"kind": "event", "text": "saved"})
        sink.close()
    first, log, finished, second = calls[:4]
    assert first["mode"] == "offline" and "offline" in said[0] and first["id"] == second["id"] and finished == "finished"
    assert log[0] == 3 and log[1]["train/loss"] == 2.5 and "train/samples" not in log[1] and "train/mfu" not in log[1]


@pytest.mark.parametrize("key, mode", [(None, "offline"), ("secret", None)])
def test_swanlab_without_a_key_is_offline(tmp_path, monkeypatch, key, mode):
    calls = []
    fake = SimpleNamespace(
        Settings=lambda: SimpleNamespace(api_key=key),
        init=lambda **options: calls.append(options),
        log=lambda values, step: calls.append((step, values)),
        finish=lambda: calls.append("finished"),
    )
    monkeypatch.setitem(sys.modules, "swanlab", fake)
    monkeypatch.delenv("SWANLAB_MODE", raising=False)
    said = []
    sink = build_sinks(MetricsConfig(swanlab="project"), tmp_path, {"name": "run"}, say=said.append)[1]
    sink.write(3, {"kind": "validation", "source": "plays", "loss": 1.5})
    sink.close()
    assert calls[0]["mode"] == mode and calls[1:] == [(3, {"validation/plays": 1.5}), "finished"]
    assert bool(said) == (key is None) and ("id" in calls[0]) == (key is not None)


class Clock:
    """A clock that is moved by hand."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def meter(**options) -> tuple[SpeedMeter, Clock]:
    clock = Clock()
    return SpeedMeter(clock=clock, **options), clock


def run_step(speed, clock, seconds, *, tokens=1000, wait=0.0):
    clock.now += wait
    speed.start_step()
    clock.now += seconds
    speed.end_step(tokens=tokens, flops_per_token=6.0)


def test_speed_counts_waiting_but_not_pauses():
    speed, clock = meter(peak_flops=4000.0, ranks=2)
    run_step(speed, clock, 2.0, wait=50.0)  # before the first step the clock does not run
    assert (speed.step_seconds, speed.tokens_per_second) == (2.0, 500.0)
    with speed.pause():
        clock.now += 7.0
    run_step(speed, clock, 1.0, wait=1.0)
    assert speed.step_seconds == 2.0 and speed.tokens_per_second == 500.0
    assert speed.mfu == pytest.approx(500 * 6 / (4000 * 2))
    assert (speed.total_seconds, speed.paused_seconds, speed.total_tokens) == (4.0, 7.0, 2000)
    assert speed.eta(1000) == pytest.approx(2.0 * (1 + 7 / 4))


def test_speed_window_slides():
    speed, clock = meter(peak_flops=None, ranks=1, window=2)
    for seconds in (10.0, 1.0, 1.0):
        run_step(speed, clock, seconds)
    assert speed.tokens_per_second == 1000.0 and speed.average_tokens_per_second == 250.0
    assert speed.mfu is None
