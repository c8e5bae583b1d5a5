"""Conversations train the same on every mesh: rows with few targets or none, and steps whose ranks have unequal numbers of them."""

import json
from collections import Counter

import numpy as np
import pytest
from chat_tokenizer import byte_level
from sameness import gradient_difference, loss_difference, norm_difference
from worlds import run_world

STEPS = 3
MESHES = {
    "dp_shard 2": {"dp_shard": 2},
    "tp 2": {"tp": 2},
    "cp 2": {"cp": 2},
    "pp 2": {"pp": 2},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, dict]:
    """The run of one process and those of all meshes, two heads ahead included, in float64."""
    folder = tmp_path_factory.mktemp("conversations")
    byte_level(folder / "tokenizer")
    draw = np.random.default_rng(5)
    records = [{"prompt": "q" * int(draw.integers(1, 22)), "response": "a" * int(draw.integers(1, 16))} for _ in range(60)]
    (folder / "x.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    given = {"path": str(folder / "x.jsonl"), "tokenizer": str(folder / "tokenizer"), "cache": str(folder / "cache"), "too_long": "skip"}
    model = {"vocab_size": 400, "mtp": {"heads": 1}}

    def scenario(parallel: dict) -> dict:
        changes = {"model": model, "parallel": parallel, "precision": "fp64", "train": {"micro_batch": 1}}
        return {"changes": changes, "conversations": given, "stop": STEPS}

    one = {"one": scenario({})}
    results = run_world("sameness:train_all", 1, args={"scenarios": one}, folder=tmp_path_factory.mktemp("one"))
    two = {name: scenario(parallel) for name, parallel in MESHES.items()}
    return results | run_world("sameness:train_all", 2, args={"scenarios": two}, folder=tmp_path_factory.mktemp("two"))


@pytest.mark.parametrize("mesh", MESHES)
def test_float64_is_the_same_on_every_mesh(runs, mesh):
    run, alone = runs[mesh], runs["one"]
    assert loss_difference(run, alone) < 1e-10
    assert gradient_difference(run, alone) < 1e-9
    assert norm_difference(run, alone) < 1e-9


def test_ranks_have_unequal_numbers_of_targets(runs):
    counts = [sum(rank) for rank in runs["dp_shard 2"]["counts"]]
    assert counts[0] != counts[1] and sum(counts) == sum(runs["one"]["counts"][0])
    rows = Counter(runs["one"]["counts"][0])
    assert rows[0] == 3 and len(rows) > 2, "of 8 rows, samples 1, 4 and 7 have no target"
