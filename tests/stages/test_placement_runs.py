"""`llmtrain train` with experts that move between two ranks: what it says, and a resumption on one rank, where there is nothing to move."""

import pytest

EXPERTS = "{kind: moe, experts: 4, top_k: 1, hidden: 32, router: {score: sigmoid}}"
WORDS = ("--model.ffn", EXPERTS, "--precision", "fp64", "--train.steps", "8", "--checkpoint.every", "4")
WORDS += ("--parallel.expert_placement", "{every: 3, gain: 0.0}")


@pytest.fixture(scope="module")
def moving(lab):
    return lab.train("moving", *WORDS, "--parallel.dp_shard", "2", "--parallel.ep", "2")


def test_a_move_is_an_event_and_its_seconds_are_told(moving):
    events = [line for line in moving.lines("event") if line["text"].startswith("experts of ")]
    assert events and {line["step"] for line in events} <= {4, 7}, "before the steps that follow 3 and 6"
    assert "not counted as training: std / mean of the ranks' tokens" in events[0]["text"]
    spent = {line["step"] for line in moving.lines("train") if line.get("move_seconds", 0) > 0}
    assert spent == {line["step"] for line in events} | {5}, "after the checkpoint of step 4 they go back"
    assert "rank_load 1." in moving.out


def test_one_rank_goes_on_with_the_same_losses(lab, moving):
    lab.copy(moving, "settled", newest=4)
    run = lab.train("settled", *WORDS, "--parallel.dp_shard", "1")
    assert run.resumed() == 4 and "parallel.expert_placement: not used, every rank has all experts" in run.out
    assert run.losses()[4:] == pytest.approx(moving.losses()[4:], rel=1e-10)
