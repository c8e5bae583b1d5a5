"""A rank that stops inside DeepSpeed's backward pass: the others' wait is reported and ended as under engine native."""

import pytest
from hang_runs import Case, run_all

pytestmark = pytest.mark.deepspeed
WORDS = ("--parallel.dp_shard", "2", "--engine", "deepspeed", "--engine.zero", "2")
UNNAMED = "undefined"
"""What torch calls the group that DeepSpeed makes."""


def test_a_rank_asleep_in_a_reduction_is_found(tmp_path):
    asleep = {"act": "sleep", "axis": UNNAMED, "rank": 1, "direction": "backward"}
    outcome = run_all(tmp_path, {"run": Case(asleep, WORDS)})["run"]
    assert outcome.code == 3 and outcome.left == 0
    assert outcome.in_time(), outcome.took
    rows = outcome.rows()
    assert "waits" in rows["0"] and "all_reduce" in rows["0"] and "backward" in rows["0"], outcome.report
    assert "waits" not in rows["1"], outcome.report
