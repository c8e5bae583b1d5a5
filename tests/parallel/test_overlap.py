"""Forward passes that compute while tokens of another micro-batch's backward pass travel, and the other way round."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from worlds import run_world

from llmtrain.parallel.hang.record import Field
from llmtrain.parallel.hang.where import HERE, at
from llmtrain.parallel.turns import hand_over, together

NODES = {"ep_kind": "hierarchical", "ep_inner": 1}
TURNS = {"overlap_micro_batches": True}
CASES = {
    "dualpipev": {"parallel": {"schedule": "dualpipev"}},
    "dualpipev, in turns": {"parallel": {"schedule": "dualpipev"} | TURNS},
    "dualpipev, in turns, recomputed": {"parallel": {"schedule": "dualpipev"} | TURNS, "train": {"recompute": "full"}},
    "interleaved, in turns": {"parallel": {"schedule": "interleaved"} | TURNS},
    "nodes": {"parallel": {"schedule": "dualpipev"} | NODES},
    "nodes, in turns": {"parallel": {"schedule": "dualpipev"} | NODES | TURNS},
}


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, dict]:
    return run_world("overlap_world:steps", 4, args={"cases": CASES}, folder=tmp_path_factory.mktemp("overlap"))


@pytest.mark.parametrize("case", [name for name in CASES if "in turns" in name])
def test_gradients_are_the_same_bit_for_bit(case, found):
    run, alone = found[case], found["nodes" if "nodes" in case else "dualpipev"]
    assert run["loss"] == alone["loss"] and run["norm"] == pytest.approx(alone["norm"], rel=1e-14) and alone["norm"] > 0
    assert {name for name, gradient in run["gradients"].items() if not np.array_equal(gradient, alone["gradients"][name])} == set()
    assert len(run["pairs"]) > 1 and alone["pairs"] == []


def test_each_half_computes_while_the_other_one_travels(found):
    """Attention F | combine B, experts B | dispatch F, experts F | dispatch B, attention B | combine F (MindSpeed, --moe-fb-overlap)."""
    turns = ["B sends", "F attention, sends", "B waits, experts, sends", "F waits, experts, sends", "B waits, attention", "F waits"]
    expected = [f"{turn[0]} {what}" for turn in turns for what in turn[2:].split(", ")]
    for schedule in ("dualpipev", "interleaved"):
        pairs = found[f"{schedule}, in turns"]["pairs"]
        assert pairs == [expected] * len(pairs)


def run(first, second) -> None:
    with ThreadPoolExecutor(1) as beside:
        together(first, second, beside=beside)


def test_halves_of_different_lengths():
    said = []

    def half(name: str, turns: int):
        def work() -> None:
            for turn in range(turns):
                said.append(f"{name}{turn}")
                hand_over()
            said.append(name)

        return work

    run(half("b", 3), half("f", 1))
    assert said == ["b0", "f0", "b1", "f", "b2", "b"]
    said.clear()
    run(half("b", 0), half("f", 2))
    assert said == ["b", "f0", "f1", "f"]
    hand_over()  # nothing outside of a pair


def test_the_report_of_a_hang_would_say_where_the_half_is_that_computes():
    seen = []

    def half(micro_batch: int):
        def work() -> None:
            at(micro_batch=micro_batch)
            for _ in range(3):
                hand_over()
                seen.append((micro_batch, HERE.slots[Field.MICRO_BATCH]))

        return work

    run(half(3), half(5))
    assert sorted(seen) == [(3, 3)] * 3 + [(5, 5)] * 3


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("turns", [0, 1, 2])
def test_an_error_of_either_half_ends_both(first, turns):
    went_on = []

    def fails() -> None:
        for _ in range(turns):
            hand_over()
        raise ValueError("its own")

    def waits() -> None:
        for _ in range(4):
            hand_over()
        went_on.append(1)

    with pytest.raises(ValueError, match="its own"):
        run(*((fails, waits) if first else (waits, fails)))
    assert went_on == [] and threading.active_count() < 20
    run(lambda: None, lambda: None)
