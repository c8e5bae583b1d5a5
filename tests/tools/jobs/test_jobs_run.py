"""The job files of a tiny run, started for real: by bash, and by a stand-in for srun that starts tasks as Slurm does."""

import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from job_files import environment, llmtrain

SRUN = """#!/usr/bin/env python3
# Starts one task per rank with the variables that Slurm gives it; ends with the highest exit code, as srun does.
import os, subprocess, sys
words = sys.argv[1:]
options = {}
while words and words[0].startswith("--"):
    name, _, value = words.pop(0)[2:].partition("=")
    options[name] = value
nodes, per_node = int(options["nodes"]), int(options["ntasks-per-node"])
tasks = []
for rank in range(nodes * per_node):
    env = dict(os.environ, SLURM_STEP_ID="0", SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank % per_node),
               SLURM_NODEID=str(rank // per_node), SLURM_STEP_NUM_TASKS=str(nodes * per_node), SLURM_STEP_NODELIST="localhost",
               SLURM_STEP_TASKS_PER_NODE=f"{per_node}(x{nodes})")
    tasks.append(subprocess.Popen(words, env=env))
with open("srun.txt", "w") as record:
    record.write(" ".join(sys.argv[1:]))
sys.exit(max(task.wait() for task in tasks))
"""


@pytest.fixture
def place(corpus, tmp_path) -> Path:
    """The corpus copied to a folder of this test, with the stand-in for srun."""
    folder = tmp_path / "place"
    shutil.copytree(corpus, folder)
    (folder / "bin").mkdir()
    (folder / "bin" / "srun").write_text(SRUN)
    (folder / "bin" / "srun").chmod(0o755)
    return folder


def launch(place: Path, *words: str) -> str:
    done = llmtrain(["launch", *words, "-c", "tiny.yaml", "--device", "cpu", "--per-node", "2", "--out", "job"], place)
    assert done.returncode == 0, done.stderr
    return done.stdout


def start(place: Path, **extra: str) -> subprocess.CompletedProcess:
    env = environment() | {"PATH": f"{place / 'bin'}{os.pathsep}{os.environ['PATH']}"} | extra
    return subprocess.run(["bash", "job"], cwd=place.parent, env=env, capture_output=True, text=True, timeout=600, stdin=subprocess.DEVNULL)


def steps(place: Path) -> list[int]:
    lines = [json.loads(line) for line in (place / "runs" / "tiny" / "metrics.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if line["kind"] == "train"]


def run(place: Path, **extra: str) -> subprocess.CompletedProcess:
    (place.parent / "job").write_text((place / "job").read_text())  # from elsewhere: the script goes to its folder itself
    return start(place, **extra)


def test_torchrun_script_trains(place):
    said = launch(place, "torchrun")
    assert "1 node x 2 cpu = 2 ranks: dp_shard 2" in said and "next: bash job" in said
    done = run(place)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "mesh: dp_shard 2" in done.stdout and len(steps(place)) == 3


def test_slurm_script_trains(place):
    assert "next: sbatch job" in launch(place, "slurm")
    done = run(place, SLURM_JOB_ID="7", SLURM_JOB_END_TIME="4102444800", SLURM_NNODES="1")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "mesh: dp_shard 2" in done.stdout and len(steps(place)) == 3
    started = (place / "srun.txt").read_text()
    assert "--cpu-bind=none" in started and "--wait=60" in started


def test_slurm_script_stops_at_its_deadline_and_says_so(place):
    launch(place, "slurm", "--requeue")
    (place / "bin" / "scontrol").write_text('#!/bin/sh\necho "$@" > scontrol.txt\n')
    (place / "bin" / "scontrol").chmod(0o755)
    end = time.time() + 60  # within guards.deadline_margin, 120 s: the run saves after its first step
    done = run(place, SLURM_JOB_ID="7", SLURM_JOB_END_TIME=f"{end:.0f}")
    assert done.returncode == 2, done.stderr[-3000:]
    assert (place / "scontrol.txt").read_text().strip() == "requeue 7"
    assert (place / "runs" / "tiny" / "latest").exists() and len(steps(place)) < 3
