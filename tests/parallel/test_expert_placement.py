"""Experts that move between ranks while they train: what is learned does not change, and any mesh goes on from such a run's checkpoint."""

import re

import numpy as np
import pytest
from parity_rows import Row
from placement_world import SAVED, STEPS
from worlds import run_world

ONCE = {"train.micro_batch": 4}
FREE = ONCE | {"optim.max_grad_norm": None}
"""The norm of all gradients, summed up rank by rank, is rounded differently where experts stand elsewhere; without clipping nothing is."""
EP2 = Row({"dp_shard": 2, "ep": 2}, "MoE", FREE)
CLIPPED = Row({"dp_shard": 2, "ep": 2}, "MoE", ONCE)
SHARED = Row({"dp_shard": 4, "ep": 2}, "MoE of 6", FREE | {"train.micro_batch": 2})
SPLIT = Row({"pp": 2, "tp": 2, "ep": 2}, "MoE of 6", FREE)
SKEWED = Row({"dp_shard": 2, "ep": 2}, "MoE, skewed", ONCE)
ONE = Row({}, "MoE", FREE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("moved")


@pytest.fixture(scope="module")
def two(folder, tmp_path_factory) -> dict:
    """Runs on two ranks."""
    cases = {
        "stayed": {"do": "train", "row": EP2},
        "moved": {"do": "train", "row": EP2, "moving": "forced", "folder": str(folder)},
        "clipped": {"do": "train", "row": CLIPPED, "moving": "forced"},
        "clipped, stayed": {"do": "train", "row": CLIPPED},
        "resumed": {"do": "resume", "row": EP2, "folder": str(folder), "moving": "forced"},
        "resumed, staying": {"do": "resume", "row": EP2, "folder": str(folder)},
        "planned": {"do": "planned", "row": SKEWED},
        "refused": {"do": "refused", "row": EP2},
    }
    return run_world("placement_world:run_all", 2, args={"cases": cases}, folder=tmp_path_factory.mktemp("world-2"))


@pytest.fixture(scope="module")
def four(tmp_path_factory) -> dict:
    """Runs on four ranks."""
    rows = {"efsdp": SHARED, "pp and tp": SPLIT}
    cases = {
        f"{name}, {moving}": {"do": "train", "row": row, "moving": moving} for name, row in rows.items() for moving in (None, "forced")
    }
    return run_world("placement_world:run_all", 4, args={"cases": cases}, folder=tmp_path_factory.mktemp("world-4"))


@pytest.fixture(scope="module")
def one(folder, two, tmp_path_factory) -> dict:
    cases = {"resumed": {"do": "resume", "row": ONE, "folder": str(folder)}}
    return run_world("placement_world:run_all", 1, args={"cases": cases}, folder=tmp_path_factory.mktemp("world-1"))


def same_bits(a: dict, b: dict) -> list[str]:
    """Names whose values differ."""
    assert a.keys() == b.keys()
    return [name for name in a if not np.array_equal(a[name], b[name])]


def test_the_loss_curve_does_not_notice(two):
    stayed, moved = two["stayed"], two["moved"]
    assert moved["losses"] == stayed["losses"], "in float64 not one bit"
    assert same_bits(moved["state"], stayed["state"]) == [], "weights and moments, by number of the expert"
    assert any(np.abs(value).max() > 0 for name, value in moved["state"].items() if "experts" in name and name.endswith("exp_avg_sq"))
    assert two["clipped"]["losses"] == pytest.approx(two["clipped, stayed"]["losses"], rel=1e-10)


def test_experts_really_were_elsewhere_with_their_moments(two):
    moved = two["moved"]["moved"]
    assert moved["away"] >= 6 and len(moved["same"]) == 3 * 3 * 3 and all(moved["same"])
    assert moved["tables"] == [list(range(5))] * 3, "who looks at the state finds them at home"


@pytest.mark.parametrize("mesh", ["efsdp", "pp and tp"])
def test_other_meshes(four, mesh):
    """Where shards of one rank's experts move between other shards too; and where ranks hold some of the layers."""
    stayed, moved = four[f"{mesh}, None"], four[f"{mesh}, forced"]
    assert moved["losses"] == pytest.approx(stayed["losses"], rel=1e-12)
    assert moved["moved"]["away"] >= 8 and all(moved["moved"]["same"])
    for name, value in stayed["state"].items():
        assert np.linalg.norm(moved["state"][name] - value) <= 1e-12 * np.linalg.norm(value), name


def test_a_checkpoint_of_moved_experts_goes_on_anywhere(two, one):
    saved, losses = two["moved"]["saved"], two["moved"]["losses"][SAVED:]
    for name, run in (("again", two["resumed"]), ("staying", two["resumed, staying"]), ("one process", one["resumed"])):
        assert same_bits(run["loaded"], saved) == [], name
    assert two["resumed"]["losses"] == losses and same_bits(two["resumed"]["state"], two["moved"]["state"]) == []
    assert two["resumed, staying"]["losses"] == losses
    assert one["resumed"]["losses"] == pytest.approx(losses, rel=1e-10)


def test_the_planner_parts_experts_that_crowd_one_rank(two):
    planned = two["planned"]
    before, after = planned["rank_load"][1], planned["rank_load"][2]
    assert min(before) > 1.5 and max(after) < 1.3, "the first two experts start on the first rank"
    assert [bool(events) for events in planned["events"]][:3] == [False, False, True]
    (text,) = planned["events"][2]
    found = re.match(
        r"experts of 3 of 3 layers moved in [\d.]+ s, not counted as training: std / mean of the ranks' tokens (\S+) -> (\S+) ", text
    )
    assert float(found[1]) > 0.5 > 0.3 > float(found[2])
    assert [seconds > 0 for seconds in planned["seconds"]][:3] == [False, False, True]
    assert all(slots[0] // 2 != slots[1] // 2 for slots in planned["slots"])
    assert len(planned["rank_load"]) == STEPS


def test_gradients_are_not_left_behind(two):
    assert two["refused"] == "experts cannot move while there are gradients: call apply or discard first"
