"""The engine megatron against one native process: losses, gradients of each parameter, state carried from engine to engine.

Runs where megatron-core is installed (`make test-engines`), each world in processes of its own, whose torch answers for CUDA.
"""

from functools import partial
from importlib.util import find_spec

import numpy as np
import pytest
import worlds
from megatron_rows import ROWS
from parity_rows import Row, references, schedule
from sameness import loss_difference

from llmtrain.packages import installed_version

FRESH = find_spec("deepspeed") is not None
"""Ranks are interpreters of their own where others would be forks of one that has imported DeepSpeed."""
run_world = partial(worlds.run_world, fresh=FRESH)
pytestmark = pytest.mark.skipif(installed_version("megatron-core") is None, reason="megatron-core is not installed; make test-engines")
STEPS, FACTOR = 8, 5.0
NUDGES = 3
GRADIENT = 1e-5
"""Largest difference of a gradient in float32, relative to its norm or to a thousandth of the largest one's; 2.8e-6 was measured."""


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    """One-process runs by name."""
    scenarios = {}
    for row in ROWS:
        for name, scenario in references(row).items():
            if not name.endswith("fp64") and not any(name.endswith(f"nudged {seed}") for seed in range(NUDGES, 9)):
                scenarios[name] = scenario | {"stop": STEPS}
    return run_world("sameness:train_all", 1, args={"scenarios": scenarios}, folder=tmp_path_factory.mktemp("native"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The rows under megatron, by name."""
    found = {}
    for ranks in sorted({row.shape.world for row in ROWS}):
        scenarios = {row.name: row.scenario("fp32", stop=STEPS) for row in ROWS if row.shape.world == ranks}
        folder = tmp_path_factory.mktemp(f"ranks{ranks}")
        found |= run_world("megatron_world:train_all", ranks, args={"scenarios": scenarios}, folder=folder)
    return found


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_row_trains_as_one_native_process(row, runs, native):
    run, reference = runs[row.name], native[f"{row.reference} | fp32"]
    others = [native[f"{row.reference} | {kind}"] for kind in ("control", *(f"nudged {seed}" for seed in range(NUDGES)))]
    assert loss_difference(run, reference) <= FACTOR * max(loss_difference(other, reference) for other in others)
    assert run["norms"][0] == pytest.approx(reference["norms"][0], rel=3e-6)
    assert run["gradients"].keys() == reference["gradients"].keys()
    least = 1e-3 * max(np.linalg.norm(gradient) for gradient in reference["gradients"].values())
    for name, gradient in reference["gradients"].items():
        off = np.linalg.norm(run["gradients"][name] - gradient) / max(np.linalg.norm(gradient), least)
        assert off < GRADIENT, name


CHAIN = [
    ("native", {}, {}),
    ("megatron", {"tp": 2}, {}),
    ("megatron", {"dp_shard": 2}, {}),
    ("megatron", {"pp": 2}, schedule("interleaved", 2)),
    ("native", {}, {}),
]
"""One run under several engines and meshes, the last step of each saved and loaded by the next."""


def carried(folder, model: str, steps: int, chain) -> list[dict]:
    found = []
    for index, (engine, mesh, options) in enumerate(chain):
        changes = Row(mesh, model, options).scenario("fp32")["changes"] | {"engine": engine}
        ranks = Row(mesh).shape.world
        source, target = (str(folder / str(number)) for number in (index - 1, index))
        args = {"changes": changes, "source": source if index else None, "target": target}
        args |= {"first": len(found) * steps, "steps": steps if steps else 3 * (index == 0)}
        found.append(run_world("megatron_world:carry", ranks, args=args, folder=folder))
    return found


@pytest.mark.parametrize("model", ["4 layers, tied", "MoE, 4 layers"])
def test_weights_and_moments_go_round_bit_for_bit(model, tmp_path):
    experts = [("megatron", {"dp_shard": 2, "ep": 2}, {}), ("megatron", {"tp": 2, "ep": 2}, {})] if "MoE" in model else []
    first, *others = carried(tmp_path, model, 0, [*CHAIN[:-1], *experts, CHAIN[-1]])
    start = first["after"]
    assert int(start["step"]) == 3 and any(key.endswith("exp_avg_sq") and value.any() for key, value in start.items())
    for later in others:
        assert later["after"].keys() == start.keys()
        assert all(later["after"][key].tobytes() == start[key].tobytes() for key in start), "a bit has changed"


def test_a_run_goes_on_from_engine_to_engine(tmp_path):
    parts = carried(tmp_path, "4 layers", 3, CHAIN)
    losses = [loss for part in parts for loss in part["losses"]]
    scenarios = {name: scenario | {"stop": len(losses)} for name, scenario in references(Row({}, "4 layers")).items() if "fp64" not in name}
    runs = run_world("sameness:train_all", 1, args={"scenarios": scenarios}, folder=tmp_path)
    alone = runs.pop("4 layers | fp32")
    assert loss_difference({"losses": losses}, alone) <= FACTOR * max(loss_difference(other, alone) for other in runs.values())
