"""Signals and deadlines."""

import os
import signal
import subprocess
import sys
import time
from datetime import datetime, timezone
from pathlib import Path

import pytest

from llmtrain.config.train import GuardsConfig
from llmtrain.errors import UserError
from llmtrain.train.stopping import StopRequest, deadline_of

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _no_slurm(monkeypatch):
    for name in ("SLURM_JOB_END_TIME", "SLURM_JOB_ID", "RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_asks_to_stop_and_the_handlers_come_back(signum, capfd):
    handler = lambda *_: None  # noqa: E731
    before = signal.signal(signum, handler)
    with StopRequest(GuardsConfig()) as stop:
        assert stop.should_stop() is None
        os.kill(os.getpid(), signum)
        assert stop.should_stop() == signum.name
        if signum != signal.SIGINT:
            os.kill(os.getpid(), signum)  # a scheduler may repeat itself
    assert signal.signal(signum, before) is handler
    assert "stopping after this step" in capfd.readouterr().err


def test_what_was_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
    try:
        with StopRequest(GuardsConfig()) as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.should_stop() is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_only_rank_0_says_so(monkeypatch, capfd):
    monkeypatch.setenv("RANK", "1")
    with StopRequest(GuardsConfig()):
        os.kill(os.getpid(), signal.SIGTERM)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("saved", [True, False])
def test_second_ctrl_c_ends_at_once_and_says_what_is_saved(tmp_path, saved):
    if saved:
        (tmp_path / "checkpoints/step-00000100").mkdir(parents=True)
        (tmp_path / "latest").symlink_to("checkpoints/step-00000100")
    script = f"""
import signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)
from pathlib import Path
from llmtrain.config.train import GuardsConfig
from llmtrain.train.stopping import StopRequest
with StopRequest(GuardsConfig(), folder=Path({str(tmp_path)!r})):
    print("ready", flush=True)
    while True:
        time.sleep(0.05)
"""
    run = subprocess.Popen(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert run.stdout.readline() == "ready\n"
    run.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert run.poll() is None
    run.send_signal(signal.SIGINT)
    _, err = run.communicate(timeout=10)
    assert run.returncode == 130
    assert ("step-00000100" in err) if saved else ("no checkpoint is complete" in err)


def test_deadline_with_its_margin():
    moment = time.time() + 1000
    text = datetime.fromtimestamp(moment, tz=timezone.utc).isoformat()
    with StopRequest(GuardsConfig(deadline=text, deadline_margin=60)) as stop:
        assert stop.should_stop() is None and stop.should_stop(moment - 61) is None
        assert "deadline" in stop.should_stop(moment - 59)


def test_iso_times():
    assert deadline_of("2026-01-31T18:00:00+01:00") == deadline_of("2026-01-31T17:00:00Z") == 1769878800
    assert deadline_of("2026-01-31T18:00:00") == datetime(2026, 1, 31, 18).timestamp()
    assert deadline_of(None) is None


@pytest.mark.parametrize("text", ["tomorrow", "18:00", ""])
def test_a_deadline_that_is_no_time(text):
    with pytest.raises(UserError, match=r"guards\.deadline"):
        deadline_of(text)


def test_a_deadline_in_the_past_is_refused():
    with pytest.raises(UserError, match="in the past"), StopRequest(GuardsConfig(deadline="2020-01-01T00:00:00")):
        pass


def test_slurm_by_its_variable(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_END_TIME", "1769878800")
    assert deadline_of("slurm") == 1769878800


def test_slurm_outside_a_job():
    with pytest.raises(UserError, match="SLURM_JOB_ID is not set"):
        deadline_of("slurm")


def fake_squeue(folder: Path, monkeypatch, script: str) -> None:
    tool = folder / "squeue"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    monkeypatch.setenv("SLURM_JOB_ID", "42")


def test_slurm_is_asked(tmp_path, monkeypatch):
    fake_squeue(tmp_path, monkeypatch, '[ "$*" = "-h -j 42 -o %e" ] && echo 2026-01-31T18:00:00')
    assert deadline_of("slurm") == datetime(2026, 1, 31, 18).timestamp()
    monkeypatch.setenv("RANK", "3")
    assert deadline_of("slurm") is None, "only rank 0 asks"


@pytest.mark.parametrize("script, says", [("echo N/A", "knows no end"), ("echo gone >&2; exit 1", "gone")])
def test_slurm_without_an_answer(tmp_path, monkeypatch, script, says):
    fake_squeue(tmp_path, monkeypatch, script)
    with pytest.raises(UserError, match=says):
        deadline_of("slurm")


def test_no_squeue(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="squeue is not on the PATH"):
        deadline_of("slurm")
