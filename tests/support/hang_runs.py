"""Runs of some ranks of which one misbehaves, seen to their end."""

import json
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch
from torch.torch_version import TorchVersion

from llmtrain.data.token_file import TokenWriter

ROOT = Path(__file__).parents[2]
WORLD = Path(__file__).parent / "hang_world.py"
TIMEOUT = 12.0  # parallel.timeout, seconds; on a busy machine ranks may start some seconds after each other
# Gloo before torch 2.13 keeps a rank in C++ for longer, and does not record what it waits for in some collectives (docs/torch-versions.md).
OLD_GLOO = TorchVersion(torch.__version__) < "2.13"
LATE = 10.0 if OLD_GLOO else 5.0  # seconds after the time-out by which a report is there
AT_ONCE = 8  # processes
STEP = 3  # at which the fault happens
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
from typing import Any
from llmtrain.tools.launch import run_local
sys.exit(run_local(sys.argv[4:], int(sys.argv[2]), logs=Path(sys.argv[3]), command=[sys.executable, sys.argv[1]]))
"""


@dataclass
class Outcome:
    """How a faulty run ended."""

    code: int | None
    err: str
    report: str
    took: float  # seconds from the last step's line to the report
    left: int  # processes that it left, -1 if they were not seen

    def in_time(self) -> bool:
        return TIMEOUT <= self.took <= TIMEOUT + LATE

    def rows(self) -> dict[str, str]:
        """The table's rows by rank."""
        return {line.split()[0]: line for line in self.report.split("\n\n")[1].splitlines()[1:]}

    def layers(self) -> dict[str, str]:
        """By rank, the layer that its row names: `block 1 forward`."""
        found = {rank: re.search(r"training, ([a-z]+(?: \S+)? (?:for|back)ward)", row) for rank, row in self.rows().items()}
        return {rank: match.group(1) for rank, match in found.items() if match}


class Faulty:
    """One run: started by the launcher, or, where `place` has a rank's environment, a rank alone. `fault` as in hang_world.py."""

    def __init__(self, folder: Path, fault: dict, words: tuple[str, ...], *, ranks: int = 2, place: dict[str, str] | None = None):
        self.folder, self.run, self.name = folder, folder / "runs" / "run", (place or {}).get("RANK", "")
        _prepare(folder)
        env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        env |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", **(place or {})}
        env["LLMTRAIN_FAULT"] = json.dumps(fault | {"step": STEP})
        argv = ["train", "-c", "run.yaml", "--name", "run", "--parallel.timeout", str(TIMEOUT), *words]
        launched = ["-c", LAUNCHER, str(WORLD), str(ranks), str(self.run / "log"), *argv]
        with open(folder / f"out{self.name}", "w") as out, open(folder / f"err{self.name}", "w") as err:
            command = [sys.executable, *([WORLD, *argv] if place else launched)]
            self.process = subprocess.Popen(command, cwd=folder, env=env, stdout=out, stderr=err)
        self.seen: set[psutil.Process] = set()

    def look(self) -> bool:
        """Note the run's processes; whether it still runs. A rank that was stopped never ends."""
        if self.process.poll() is not None:
            return False
        process = psutil.Process(self.process.pid)
        self.seen |= set(process.children(recursive=True))
        return process.status() != psutil.STATUS_STOPPED

    def outcome(self) -> Outcome:
        """How it ended; what is left of it is killed."""
        code = self.process.poll()
        left = [process for process in self.seen if process.is_running()]
        for process in [self.process, *left]:
            process.kill()
        self.process.wait()
        hang, metrics = self.run / "log" / "hang.txt", self.run / "metrics.jsonl"
        steps = metrics.read_text().splitlines() if metrics.exists() else []
        took = hang.stat().st_mtime - json.loads(steps[-1])["time"] if hang.exists() and steps else float("nan")
        err = (self.folder / f"err{self.name}").read_text()
        print(err)
        return Outcome(code, err, hang.read_text() if hang.exists() else "", took, len(left) if len(self.seen) >= 2 else -1)


def _prepare(folder: Path) -> None:
    if (folder / "run.yaml").exists():
        return
    folder.mkdir(exist_ok=True)
    with TokenWriter(folder / "tokens", np.uint16) as writer:
        writer.add(np.random.default_rng(0).integers(0, 64, 40_000))
    (folder / "run.yaml").write_text(CONFIG)


def see_through(runs: dict[Any, Faulty], *, seconds: float = 300.0) -> dict[Any, Outcome]:
    """Wait for all of them, or kill what does not end."""
    end = time.monotonic() + seconds
    try:
        while time.monotonic() < end:
            running = [run.look() for run in runs.values()]
            if not any(running):
                break
            time.sleep(0.2)
    finally:
        outcomes = {name: run.outcome() for name, run in runs.items()}
    return outcomes


class Case(NamedTuple):
    """What is to happen, as in hang_world.py, and in which run."""

    fault: dict
    words: tuple[str, ...]
    ranks: int = 2


def run_all(folder: Path, cases: dict[str, Case]) -> dict[str, Outcome]:
    """Launched runs, several at once, as they mostly wait."""
    outcomes = {}
    for together in _batches(cases):
        runs = {name: Faulty(folder / name, case.fault, case.words, ranks=case.ranks) for name, case in together.items()}
        outcomes |= see_through(runs)
    return outcomes


def _batches(cases: dict[str, Case]) -> list[dict[str, Case]]:
    batches: list[dict[str, Case]] = [{}]
    for name, case in cases.items():
        if sum(other.ranks for other in batches[-1].values()) + case.ranks > AT_ONCE:
            batches.append({})
        batches[-1][name] = case
    return batches
