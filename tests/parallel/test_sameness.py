"""The spine: the same batch stream, weights and seed give the same loss on every mesh.

Design: float64 losses of 20 steps within 1e-10 relative of the one-process run and every gradient of step 1 within 1e-9 of its norm;
float32 within 5x the difference of a control run (one process, the batch order inside each step permuted).
"""

import pytest
from sameness import gradient_difference, loss_difference
from worlds import run_world

FP64 = {"precision": "fp64"}
TIED = {"model": {"tie_embeddings": True}}
ACCUMULATE = {"train": {"micro_batch": 1}}


def scenario(*changes: dict, **extra) -> dict:
    from sameness import merge

    merged: dict = {}
    for change in changes:
        merged = merge(merged, change)
    return {"changes": merged, **extra}


def mesh(**axes) -> dict:
    return {"parallel": axes}


ONE = {
    "fp64": scenario(FP64),
    "fp64 tied": scenario(FP64, TIED),
    "fp32": scenario(),
    "fp32 permuted": scenario(permute=True),
    "recompute full": scenario(FP64, {"train": {"recompute": "full"}}),
    "recompute selective": scenario(FP64, {"train": {"recompute": "selective"}}),
    "whole batch at once": scenario(FP64, {"train": {"micro_batch": 8}}),
}
TWO = {
    "shard 2": scenario(FP64, mesh(dp_shard=2)),
    "shard 2, accumulation": scenario(FP64, mesh(dp_shard=2), ACCUMULATE),
    "shard 2, no accumulation": scenario(FP64, mesh(dp_shard=2), {"train": {"micro_batch": 4}}),
    "shard 2, recompute full": scenario(FP64, mesh(dp_shard=2), {"train": {"recompute": "full"}}),
    "shard 2, recompute selective, accumulation": scenario(FP64, mesh(dp_shard=2), ACCUMULATE, {"train": {"recompute": "selective"}}),
    "shard 2, kept gathered": scenario(FP64, mesh(dp_shard=2, reshard_after_forward=False)),
    "replicate 2": scenario(FP64, mesh(dp_replicate=2)),
    "shard 2, tied": scenario(FP64, TIED, mesh(dp_shard=2)),
    "shard 2, fp32": scenario(mesh(dp_shard=2)),
    "broken count": scenario(FP64, mesh(dp_shard=2), fault="count"),
    "broken sync": scenario(FP64, mesh(dp_shard=2), ACCUMULATE, fault="sync"),
}
FOUR = {
    "shard 4": scenario(FP64, mesh(dp_shard=4)),
    "shard 4, accumulation": scenario(FP64, mesh(dp_shard=4), ACCUMULATE),
    "hsdp 2x2": scenario(FP64, mesh(dp_shard=2, dp_replicate=2)),
    "hsdp 2x2, accumulation, recompute full, tied": scenario(
        FP64, TIED, mesh(dp_shard=2, dp_replicate=2), ACCUMULATE, {"train": {"recompute": "full"}}
    ),
    "shard 4, fp32": scenario(mesh(dp_shard=4)),
    "hsdp 2x2, fp32": scenario(mesh(dp_shard=2, dp_replicate=2)),
}
WORLDS = {1: ONE, 2: TWO, 4: FOUR}


@pytest.fixture(scope="session")
def runs(tmp_path_factory) -> dict[str, dict]:
    results = {}
    for ranks, scenarios in WORLDS.items():
        folder = tmp_path_factory.mktemp(f"world-{ranks}")
        results |= run_world("sameness:train_all", ranks, args={"scenarios": scenarios}, folder=folder)
    return results


def reference(name: str) -> str:
    return "fp64 tied" if "tied" in name else "fp64"


@pytest.mark.parametrize("name", [n for s in WORLDS.values() for n in s if "fp" not in n and "broken" not in n])
def test_float64_is_the_same_on_every_mesh(runs, name):
    run, one = runs[name], runs[reference(name)]
    assert loss_difference(run, one) < 1e-10
    assert gradient_difference(run, one) < 1e-9


@pytest.mark.parametrize("name", [n for s in (TWO, FOUR) for n in s if n.endswith("fp32")])
def test_float32_is_within_five_times_the_control(runs, name):
    control = loss_difference(runs["fp32 permuted"], runs["fp32"])
    difference = loss_difference(runs[name], runs["fp32"])
    print(f"{name}: {difference:.1e}, control (permuted batch order) {control:.1e}")
    assert 0 < control < 1e-4
    assert difference <= 5 * control


@pytest.mark.parametrize("name", ["broken count", "broken sync"])
def test_a_broken_reduction_is_seen(runs, name):
    assert loss_difference(runs[name], runs["fp64"]) > 1e-6
    assert gradient_difference(runs[name], runs["fp64"]) > 1e-3


def test_ranks_and_micro_batches_have_unequal_target_counts(runs):
    counts = runs["shard 2, accumulation"]["counts"]
    assert len({count for rank in counts for count in rank}) > 4
    assert len({sum(rank) for rank in counts}) == 2


def test_the_run_learns(runs):
    losses = runs["fp64"]["losses"]
    assert losses[-1] < losses[0]
