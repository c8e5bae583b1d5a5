"""A rank that stops inside DeepSpeed's backward pass: the others' wait is reported and ended as under engine native."""

import pytest
from hang_runs import Case, run_all

pytestmark = pytest.mark.deepspeed
WORDS = ("--parallel.dp_shard", "2", "--engine", "deepspeed", "--engine.zero")
UNNAMED = "undefined"
"""What torch calls the group that DeepSpeed makes."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    asleep = {"act": "sleep", "axis": UNNAMED, "rank": 1, "direction": "backward"}
    return run_all(tmp_path_factory.mktemp("hang"), {stage: Case(asleep, (*WORDS, stage)) for stage in ("2", "3")})


@pytest.mark.parametrize("stage", ["2", "3"])
def test_a_rank_asleep_in_a_reduction_is_found(runs, stage):
    outcome = runs[stage]
    assert outcome.code == 3 and outcome.left == 0
    assert outcome.in_time(), outcome.took
    rows = outcome.rows()
    assert "waits" in rows["0"] and "backward" in rows["0"], outcome.report
    assert "waits" not in rows["1"], outcome.report
