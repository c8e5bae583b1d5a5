"""Ranks that no launcher has started, on one machine and on two that meet through the store."""

import pytest
from hang_runs import LATE, TIMEOUT, Faulty, see_through

from llmtrain.parallel.hang.board import VARIABLE
from llmtrain.tools.launch import reserved_port

DP = ("--parallel.dp_shard", "2")


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """(case, rank) -> how the rank ended. In `one` the ranks share a machine, in the others each has its own."""
    folder, runs = tmp_path_factory.mktemp("machines"), {}
    with reserved_port() as first, reserved_port() as second, reserved_port() as third:
        for (case, act), port in zip({"one": "sleep", "two": "sleep", "silent": "stop"}.items(), (first, second, third)):
            here = folder / case
            (here / "tmp").mkdir(parents=True)
            for rank in range(2):
                place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
                place |= {"TMPDIR": here / "tmp"} | ({} if case == "one" else {VARIABLE: here / f"machine-{rank}"})
                fault = {"act": act, "axis": "dp_shard", "rank": 1, "direction": "forward"}
                runs[case, rank] = Faulty(here, fault, DP, place={name: str(value) for name, value in place.items()})
        return see_through(runs, seconds=180), folder


@pytest.mark.parametrize("case", ["one", "two"])
def test_both_end_with_one_report(outcomes, case):
    found, _ = outcomes
    assert [found[case, rank].code for rank in range(2)] == [3, 3]
    assert "rank 1 did not arrive at" in found[case, 0].err and "in _sleep" in found[case, 0].err
    assert found[case, 1].err == "", "rank 0 alone reports"
    assert "rank 1, all threads" in found[case, 0].report
    assert TIMEOUT <= found[case, 0].took <= TIMEOUT + LATE


def test_no_folder_is_left(outcomes):
    assert not list((outcomes[1] / "one" / "tmp").glob("llmtrain-*"))


def test_a_machine_that_does_not_answer(outcomes):
    found, _ = outcomes
    assert found["silent", 0].code == 3
    assert "rank 1 is on a machine that does not answer" in found["silent", 0].err
    assert TIMEOUT <= found["silent", 0].took <= TIMEOUT + LATE
