"""Calibration, logits and evaluation give the same on every mesh; masks, what is worked out of them, and rotations are made once
per micro-batch."""

import numpy as np
import pytest
from worlds import run_world

MESHES = {
    1: {"one": {}},
    2: {
        "dp": {"dp_shard": 2},
        "tp": {"tp": 2},
        "cp": {"cp": 2},
        "pp": {"pp": 2, "layers_per_stage": [1, 2]},
        "v": {"pp": 2, "schedule": "zbv", "virtual_stages": 2, "layers_per_stage": [1, 1, 1, 0], "attention": "tiled"},
        "loop": {"pp": 2, "schedule": "interleaved", "virtual_stages": 2, "layers_per_stage": [1, 1, 1, 0], "attention": "sdpa"},
    },
    4: {"tp2.pp2": {"tp": 2, "pp": 2}, "cp2.tp2": {"cp": 2, "tp": 2, "cp_kind": "ring"}},
}


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    results = {}
    for ranks, meshes in MESHES.items():
        results |= run_world("mesh_calls:calls", ranks, args={"meshes": meshes}, folder=tmp_path_factory.mktemp(f"calls-{ranks}"))
    return results


@pytest.mark.parametrize("name", [name for ranks, meshes in MESHES.items() if ranks > 1 for name in meshes])
def test_calls_give_the_same_on_every_mesh(runs, name):
    run, one = runs[name], runs["one"]
    assert run["measured"] == pytest.approx(one["measured"], rel=1e-12)
    assert np.abs(run["logits"] - one["logits"]).max() < 1e-12 * np.abs(one["logits"]).max() * 100
    assert run["evaluated"] == pytest.approx(one["evaluated"], rel=1e-12)


LOWERED = {"v": "lists", "loop": "layouts"}
"""What the attention op of a mesh makes of the lengths in a mask."""


@pytest.mark.parametrize("name", LOWERED)
def test_a_rank_makes_mask_and_rotation_once_per_micro_batch_whatever_its_stages(runs, name):
    for made in runs[name]["made_once"]:
        assert made["stages"] == 2
        assert made["prepared"] == made["rotations"] == made["micro_batches"] == 6
        assert LOWERED[name] in made["lowered"] and set(made["lowered"].values()) == {made["micro_batches"]}
        assert set(made["asked"].values()) == {made["micro_batches"] * made["blocks"]}
    assert max(made["blocks"] for made in runs[name]["made_once"]) == 2
