"""Slurm's variables mapped to those of torch.distributed."""

import os

import pytest

from llmtrain.tools.launch import is_launched
from llmtrain.tools.slurm import adopt_rank, expand_counts, first_host

STEP = {
    "SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "2", "SLURM_STEP_NUM_TASKS": "11", "SLURM_NTASKS": "11", "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1", "SLURM_NODEID": "2", "SLURM_STEP_TASKS_PER_NODE": "4(x2),3", "SLURM_STEP_NODELIST": "gpu[03-04,07]",
}  # fmt: skip


def test_a_step_of_several_tasks_is_a_rank():
    env = dict(STEP)
    assert adopt_rank(env)
    assert (env["RANK"], env["LOCAL_RANK"], env["WORLD_SIZE"], env["LOCAL_WORLD_SIZE"]) == ("9", "1", "11", "3")
    assert env["MASTER_ADDR"] == "gpu03" and 20_000 <= int(env["MASTER_PORT"]) < 40_000
    other = {**STEP, "SLURM_PROCID": "0"}
    adopt_rank(other)
    assert other["MASTER_PORT"] == env["MASTER_PORT"]


def test_the_users_own_address_is_kept():
    env = {**STEP, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234"}
    assert adopt_rank(env) and (env["MASTER_ADDR"], env["MASTER_PORT"]) == ("10.0.0.1", "1234")


@pytest.mark.parametrize("env", [{}, {"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, {**STEP, "SLURM_STEP_NUM_TASKS": "1"}])
def test_batch_scripts_and_shells_are_no_ranks(env):
    assert not adopt_rank(dict(env)) and "RANK" not in env


@pytest.mark.parametrize(
    "nodes, host", [("gpu[03-07,11],login1", "gpu03"), ("a1,a2", "a1"), ("n7", "n7"), ("r1-n[5]-ib", "r1-n5-ib"), ("x[1,3]", "x1")]
)
def test_first_host(nodes, host):
    assert first_host(nodes) == host


def test_counts():
    assert expand_counts("4(x2),3") == [4, 4, 3] and expand_counts("2") == [2]
    with pytest.raises(ValueError, match="LOCAL_WORLD_SIZE"):
        expand_counts("four")


def test_is_launched(monkeypatch):
    for name in [n for n in os.environ if n.startswith("SLURM_")] + ["RANK"]:
        monkeypatch.delenv(name, raising=False)
    assert not is_launched()
    monkeypatch.setenv("RANK", "0")
    assert is_launched()
