"""The spine: the same batch stream, weights and seed give the same loss on every mesh. The whole matrix: `make parity`, docs/parity.md.

Design: float64 losses of 20 steps (of some rows here, the first 8) within 1e-10 relative of the one-process run, every gradient of step 1
within 1e-9 of its norm, the same routing, and norms of gradients within 1e-9, by which both clip; float32 within 5x the difference of a
control run (one process, the batch order inside each step permuted), or where products are split differently of runs from nudged weights.
"""

import pytest
from parity_rows import FAULTS, MODELS, NUDGES, ROWS, Row, references
from sameness import MODEL, gradient_difference, loss_difference, merge, norm_difference, routing_difference
from worlds import run_world

from llmtrain.config.train import OptimConfig

QUICK = {row.name: row for row in ROWS if row.quick}
IN_FP32 = {name: row for name, row in QUICK.items() if row.quick == "both"}
SHORT = 8
COMPARED = [*QUICK.values(), *FAULTS.values()]
NUDGED = [f"nudged {seed}" for seed in NUDGES]


@pytest.fixture(scope="session")
def runs(tmp_path_factory) -> dict[str, dict]:
    """Every run by name, one world of processes for each number of ranks."""
    worlds: dict[int, dict[str, dict]] = {1: {}}
    for row in sorted(COMPARED, key=lambda row: row.quick in ("fp64", "both")):  # what is compared with a long run comes last and wins
        wanted = ("fp64", "fp32", "control", *NUDGED) if row.quick == "both" else ("fp64",)
        worlds[1] |= {name: scenario | stop(row) for name, scenario in references(row).items() if name.endswith(wanted)}
    for row in QUICK.values():
        worlds.setdefault(row.shape.world, {})[row.name] = row.scenario("fp64", **stop(row))
    for row in IN_FP32.values():
        worlds[row.shape.world][f"{row.name} | fp32"] = row.scenario("fp32")
    for fault, row in FAULTS.items():
        worlds[row.shape.world][fault] = row.scenario("fp64", fault=fault, stop=SHORT)
    results = {}
    for ranks, scenarios in sorted(worlds.items()):
        results |= run_world("sameness:train_all", ranks, args={"scenarios": scenarios}, folder=tmp_path_factory.mktemp(f"world-{ranks}"))
    return results


def stop(row: Row) -> dict:
    """Steps of a row that runs short."""
    return {} if row.quick in ("fp64", "both") else {"stop": SHORT}


def one(runs: dict[str, dict], row: Row, kind: str = "fp64") -> dict:
    return runs[f"{row.reference} | {kind}"]


def routed_layers(row: Row) -> int:
    """Mixtures of experts of a row's model, those of multi-token prediction included."""
    model = merge(MODEL, MODELS[row.model])
    ffn, heads = model["ffn"], model.get("mtp", {}).get("heads", 0)
    return model["layers"] - ffn.get("dense_layers", 0) + heads if ffn.get("kind") == "moe" else 0


@pytest.mark.parametrize("name", QUICK)
def test_float64_is_the_same_on_every_mesh(runs, name):
    run, alone = runs[name], one(runs, QUICK[name])
    assert loss_difference(run, alone) < 1e-10
    assert gradient_difference(run, alone) < 1e-9
    assert norm_difference(run, alone) < 1e-9
    assert max(alone["norms"]) > OptimConfig().max_grad_norm, "no step clips"
    different, choices = routing_difference(run, alone)
    assert different == 0
    assert choices == routed_layers(QUICK[name]) * 8 * 24, "every token of the step is routed in every layer"


@pytest.mark.parametrize("name", IN_FP32)
def test_float32_is_within_five_times_the_control(runs, name):
    """The control changes the order of a few sums, as data parallelism does; rounding of the initial weights stands for all others."""
    row = IN_FP32[name]
    alone = one(runs, row, "fp32")
    control = loss_difference(one(runs, row, "control"), alone)
    nudged = max(loss_difference(one(runs, row, kind), alone) for kind in NUDGED)
    difference = loss_difference(runs[f"{name} | fp32"], alone)
    print(f"{name}: {difference:.1e}, control (permuted batch order) {control:.1e}, nudged weights {nudged:.1e}")
    assert 0 < control < 1e-4 and nudged < 1e-4
    assert difference <= 5 * (control if row.shape.dp == row.shape.world else max(control, nudged))


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_reduction_is_seen(runs, fault):
    alone = one(runs, FAULTS[fault])
    assert loss_difference(runs[fault], alone) > 1e-6
    assert max(gradient_difference(runs[fault], alone), norm_difference(runs[fault], alone)) > 1e-3


def test_a_norm_that_counts_what_several_ranks_hold_is_seen_by_the_norm_alone(runs):
    run, alone = runs["holders"], one(runs, FAULTS["holders"])
    assert gradient_difference(run, alone) < 1e-9
    assert norm_difference(run, alone) > 1e-3


def test_a_token_that_goes_elsewhere_or_nowhere_is_counted():
    alone = {"routing": {"blocks.0.ffn.router": {1: (0, 2), 2: (3, 1), 3: (2, 1)}}}
    other = {"routing": {"blocks.0.ffn.router": {1: (0, 2), 2: (1, 3)}}}
    assert routing_difference(alone, alone) == (0, 3)
    assert routing_difference(other, alone) == (2, 3)


def test_ranks_and_micro_batches_have_unequal_target_counts(runs):
    counts = runs[Row({"dp_shard": 2}, options={"train.micro_batch": 1}).name]["counts"]
    assert len({count for rank in counts for count in rank}) > 4
    assert len({sum(rank) for rank in counts}) == 2


def test_names_of_rows_are_unique():
    assert len({row.name for row in ROWS}) == len(ROWS)


def test_the_run_learns(runs):
    losses = runs["GQA | fp64"]["losses"]
    assert losses[-1] < losses[0]
