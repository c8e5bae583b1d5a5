"""Checkpoints across processes: other world sizes, failures on one rank, kills at random moments."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import torch

from llmtrain.config.train import CheckpointConfig
from llmtrain.train.checkpoint import Checkpointer

WORKER = Path(__file__).with_name("checkpoint_worker.py")


def worker_module():
    spec = importlib.util.spec_from_file_location("checkpoint_worker", WORKER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def start(case: str, folder: Path, **env: str) -> subprocess.Popen:
    full = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", **env}
    return subprocess.Popen([sys.executable, str(WORKER), case, str(folder)], env=full, stdout=-1, stderr=-2, text=True)


def run_world(case: str, folder: Path, world: int) -> None:
    ranks = [start(case, folder, RANK=str(rank), WORLD_SIZE=str(world)) for rank in range(world)]
    outputs = [rank.communicate(timeout=600)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * world, "\n".join(outputs)


def test_saved_on_two_ranks_loaded_on_one_and_four_saved_as_hsdp(tmp_path):
    run_world("save_sharded", tmp_path, 2)
    worker = worker_module()
    alone = Checkpointer(tmp_path, CheckpointConfig(), log=[].append)
    for step in (1, 2):
        state = worker.whole(-5)
        assert alone.load(tmp_path / "checkpoints" / f"step-{step:08d}", state) == {"step": step}
        worker.require_equal(state, step)
    run_world("load_sharded", tmp_path, 4)
    state = worker.whole(-5)
    assert alone.load(alone.newest(), state) == {"step": 8}
    worker.require_equal(state, 8)


def test_killed_at_random_moments(tmp_path):
    killer = start("killed", tmp_path)
    output = killer.communicate(timeout=600)[0]
    assert killer.returncode == 0 and "ok, killed inside a save" in output, output
    assert torch.tensor(int(output.split(":")[-1])) > 0, f"no kill hit a save: {output}"
