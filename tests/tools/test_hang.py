"""One rank of a real run misbehaves: the report names it, and no process is left."""

import json
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pytest

from llmtrain.data.token_file import TokenWriter

ROOT = Path(__file__).parents[2]
WORLD = ROOT / "tests" / "support" / "hang_world.py"
TIMEOUT = 8.0
STEP = 3
CONFIG = """
device: cpu
model:
  {layers: 3, hidden: 32, vocab_size: 64, max_seq_len: 32, attention: {heads: 2, kv_heads: 2}, ffn: {hidden: 64}, norm: {placement: pre}}
data: {train: [tokens]}
train: {steps: 400, seq_len: 32, global_batch: 8, micro_batch: 2}
checkpoint: {every: 0}
"""
LAUNCHER = """
import sys
from pathlib import Path
from llmtrain.tools.launch import run_local
sys.exit(run_local(sys.argv[4:], int(sys.argv[2]), logs=Path(sys.argv[3]), command=[sys.executable, sys.argv[1]]))
"""
DP = ("--parallel.dp_shard", "2")
FAULTS = {  # what happens before which collective, and the options of the run
    "backward": ({"act": "sleep", "axis": "dp_shard", "rank": 1, "direction": "backward"}, DP),
    "sum": ({"act": "sleep", "axis": "world", "rank": 0}, DP),
    "stop": ({"act": "stop", "axis": "world", "rank": 0}, DP),
    "hold": ({"act": "hold", "axis": "dp_shard", "rank": 1, "direction": "forward"}, DP),
    "raise": ({"act": "raise", "axis": "dp_shard", "rank": 1, "direction": "backward"}, DP),
    "die": ({"act": "die", "axis": "dp_shard", "rank": 1, "direction": "backward"}, DP),
}
AXES = {
    "dp_replicate": ({"act": "sleep", "axis": "dp_replicate", "rank": 1}, ("--parallel.dp_replicate", "2")),
    "tp": ({"act": "sleep", "axis": "tp", "rank": 1}, ("--parallel.tp", "2")),
    "cp": ({"act": "sleep", "axis": "cp", "rank": 1}, ("--parallel.cp", "2")),
    "pp": ({"act": "sleep", "axis": "pp", "rank": 1}, ("--parallel.pp", "2")),
    "ep": (
        {"act": "sleep", "axis": "ep", "rank": 1, "op": "all_to_all_single"},
        (*DP, "--parallel.ep", "2", "--model.ffn.kind", "moe"),
    ),
}


class Faulty:
    """A run of two ranks of which one misbehaves, seen to its end."""

    def __init__(self, folder: Path, fault: dict, words: tuple[str, ...]):
        self.folder = folder
        folder.mkdir()
        with TokenWriter(folder / "tokens", np.uint16) as writer:
            writer.add(np.random.default_rng(0).integers(0, 64, 40_000))
        (folder / "run.yaml").write_text(CONFIG)
        env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        env |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        env["LLMTRAIN_FAULT"] = json.dumps(fault | {"step": STEP})
        argv = ["train", "-c", "run.yaml", "--name", "run", "--parallel.timeout", str(TIMEOUT), *words]
        self.run = folder / "runs" / "run"
        command = [sys.executable, "-c", LAUNCHER, str(WORLD), "2", str(self.run / "log"), *argv]
        out = {"stdout": (folder / "out").open("w"), "stderr": (folder / "err").open("w")}
        self.process = subprocess.Popen(command, cwd=folder, env=env, **out)
        self.seen: set[psutil.Process] = set()

    def look(self) -> bool:
        """Note the run's processes; whether it still runs."""
        if self.process.poll() is None:
            self.seen |= set(psutil.Process(self.process.pid).children(recursive=True))
        return self.process.poll() is None

    def outcome(self) -> "Outcome":
        """How it ended; what is left of it is killed."""
        code = self.process.poll()
        left = [process for process in self.seen if process.is_running()]
        for process in [self.process, *left]:
            process.kill()
        self.process.wait()
        hang, metrics = self.run / "log" / "hang.txt", self.run / "metrics.jsonl"
        steps = metrics.read_text().splitlines() if metrics.exists() else []
        took = hang.stat().st_mtime - json.loads(steps[-1])["time"] if hang.exists() and steps else float("nan")
        err = (self.folder / "err").read_text()
        print(err)
        return Outcome(code, err, hang.read_text() if hang.exists() else "", took, len(left) if len(self.seen) >= 2 else -1)


@dataclass
class Outcome:
    """How a faulty run ended."""

    code: int | None
    err: str
    report: str
    took: float  # seconds from the last step's line to the report
    left: int  # processes that it left, -1 if they were not seen

    def in_time(self) -> bool:
        return TIMEOUT <= self.took <= TIMEOUT + 5

    def rows(self) -> dict[str, str]:
        """The table's rows by rank."""
        return {line.split()[0]: line for line in self.report.split("\n\n")[1].splitlines()[1:]}


def run_all(folder: Path, faults: dict[str, tuple]) -> dict[str, Outcome]:
    """The runs at once, as they mostly wait."""
    runs, end = {}, time.monotonic() + 150
    try:
        for name, fault in faults.items():
            runs[name] = Faulty(folder / name, *fault)
        while time.monotonic() < end:
            running = [run.look() for run in runs.values()]
            if not any(running):
                break
            time.sleep(0.2)
    finally:
        outcomes = {name: run.outcome() for name, run in runs.items()}
    return outcomes


@pytest.fixture(scope="module")
def faults(tmp_path_factory):
    return run_all(tmp_path_factory.mktemp("faults"), FAULTS)


@pytest.fixture(scope="module")
def axes(tmp_path_factory):
    return run_all(tmp_path_factory.mktemp("axes"), AXES)


def test_sleep_before_a_collective_of_the_backward_pass(faults):
    found = faults["backward"]
    assert found.code == 3 and found.left == 0 and found.in_time()
    assert "rank 1 did not arrive at" in found.err and "of group dp_shard; rank 0 waited" in found.err
    rows = found.rows()
    assert "waits" in rows["0"] and "dp_shard" in rows["0"] and "block 2 backward" in rows["0"]
    assert "runs" in rows["1"] and "block 2 backward" in rows["1"] and f" {STEP} " in rows["1"]
    assert "in _sleep" in found.err, "the stack of the rank that did not arrive"
    assert found.err.count("did not arrive") == 1 and "Traceback" not in found.err


def test_sleep_before_the_loop_s_own_sum(faults):
    found = faults["sum"]
    assert found.code == 3 and found.left == 0 and found.in_time()
    assert "rank 0 did not arrive at all_reduce of group world; rank 1 waited" in found.err


def test_a_stopped_rank_0(faults):
    found = faults["stop"]
    assert found.code == 3 and found.left == 0 and found.in_time()
    assert found.err.count("rank 0 did not arrive at all_reduce of group world") == 1
    assert "rank 0 is stopped by a signal" in found.err and f"last seen at step {STEP}" in found.err


def test_a_rank_that_holds_the_interpreter(faults):
    found = faults["hold"]
    assert found.code == 3 and found.left == 0 and found.in_time()
    assert "rank 1 does not answer" in found.err
    assert "in _hold" in found.err, "its stack, by signal"


def test_a_rank_that_raises(faults):
    found = faults["raise"]
    assert found.code == 1 and found.left == 0 and found.took < TIMEOUT
    assert "rank 1 raised KeyError: 'a fault of this rank alone'; last seen at step 3" in found.err
    assert "it failed on rank 0: Connection closed by peer" in found.err


def test_a_rank_that_is_killed(faults):
    found = faults["die"]
    assert found.code == 137 and found.left == 0 and found.took < TIMEOUT
    assert f"rank 1 has ended; last seen at step {STEP}, training, block 2 backward" in found.err


@pytest.mark.parametrize("axis", AXES)
def test_sleep_in_each_axis(axes, axis):
    found = axes[axis]
    assert found.code == 3 and found.left == 0 and found.in_time()
    assert "rank 1 did not arrive" in found.err and re.search(rf"of group (\w+/)*{axis}(/\w+)*; rank 0 waited", found.err)
    assert f"last seen at step {STEP}" in found.err
