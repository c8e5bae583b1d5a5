"""The self-test on this machine's CPU, as a user runs it: sound kernels pass, a broken one from a plugin is found."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llmtrain.tools.selftest.report import read

ROOT, HERE = Path(__file__).parents[3], Path(__file__).parent


def selftest(*words: str, folder: Path) -> subprocess.CompletedProcess:
    env = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    env |= {"PYTHONPATH": f"{ROOT}{os.pathsep}{HERE}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "llmtrain", "selftest", "--device", "cpu", "--out", "report.md", *words]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=600, stdin=subprocess.DEVNULL)


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> tuple[subprocess.CompletedProcess, Path]:
    folder = tmp_path_factory.mktemp("sound")
    return selftest("--ranks", "2", "--only", "kernels,parity,bench", folder=folder), folder / "report.md"


def test_a_sound_machine_passes(sound):
    done, path = sound
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    found = read(path)
    assert found["failed"] == [] and found["parts"] == ["kernels", "parity", "bench"]
    assert "100%" in done.stdout and " to go" in done.stdout and "one file to send back" in done.stdout


def test_every_axis_is_compared(sound):
    lines = read(sound[1])["parity"]
    passed = {(line["name"], line["precision"]) for line in lines if line["state"] == "passed"}
    names = ["dp_shard 2", "dp_replicate 2", "tp 2", "pp 2", "cp 2 (all_gather)", "cp 2 (ring)", "cp 2 (ulysses)"]
    names += ["dp_shard 2 x ep 2, MoE", "tp 2 x ep 2, MoE"]
    assert passed == {(name, precision) for name in names for precision in ("fp64", "fp32")}
    assert all(0 < line["loss_bound"] < 1e-3 and 0 < line["gradient_bound"] < 1e-2 for line in lines)
    assert any(line["gradient"] > 0 for line in lines)


KNOWN = ("needs the package triton", "Triton's interpreter", "interpreter of Triton", "only for checking the Volta kernels")
"""Reasons for which an implementation that names the CPU is not judged here."""


def test_every_op_is_judged(sound):
    import llmtrain.ops as ops

    lines = read(sound[1])["kernels"]
    judged = {(line["op"], line["implementation"]) for line in lines if line["state"] == "passed"}
    here = {(op, e.name) for op in ops.op_names() for e in ops.implementations(op) if "cpu" in e.devices}
    reasons = {(x["op"], x["implementation"]): x.get("why") for x in lines if x["format"] == "fp16"}  # of those that serve only it, too
    for missing in here - judged:
        assert any(why in reasons[missing] for why in KNOWN), reasons[missing]


def test_speed_is_measured(sound):
    lines = {line["name"]: line for line in read(sound[1])["bench"]}
    assert lines["matmul 1024 fp32"]["flops"] > 1e8 and lines["memory"]["bytes_per_second"] > 1e7
    assert lines["all-reduce 1 MiB"]["right"] is True
    for name in ("train, 1 rank", "train, 2 ranks"):
        assert lines[name]["tokens_per_second"] > 10
        assert all(abs(loss - math.log(2048)) < 0.5 for loss in lines[name]["losses"])  # of random tokens


def test_no_name_of_the_machine_is_in_the_file(sound):
    import socket

    text, host = sound[1].read_text(), socket.gethostname()
    assert len(host) < 3 or f" {host} " not in text
    assert str(Path.home()) == "/root" or str(Path.home()) not in text


def test_a_broken_kernel_is_found(tmp_path):
    done = selftest("--ranks", "1", "--only", "kernels", "--plugin", "broken_swiglu", folder=tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    failed = read(tmp_path / "report.md")["failed"]
    assert failed and all(line.startswith("kernels.swiglu=broken") for line in failed)
    assert any("d gate differs from float64" in line for line in failed) and not any(" out differs" in line for line in failed)
    assert "failed: kernels.swiglu=broken fp64" in done.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--only", "kernel"], "--only kernel: 'kernel' is no part; allowed: doctor, kernels, parity, bench"),
        (["--ranks", "0", "--only", "bench"], "--ranks 0: at least 1"),
    ],
)
def test_wrong_words(words, said, tmp_path):
    done = selftest(*words, folder=tmp_path)
    assert done.returncode == 1 and said in done.stderr and not (tmp_path / "report.md").exists()
