"""The engine megatron against one native process: losses, gradients of each parameter, how experts are used.

Runs where megatron-core is installed (`make test-engines`), each world in processes of its own, whose torch answers for CUDA.
"""

from importlib.util import find_spec

import numpy as np
import pytest
import worlds
from engine_parity import differences, numbers, say
from megatron_faults import FAULTS
from megatron_rows import ROWS
from parity_rows import Row, references, schedule
from sameness import loss_difference

from llmtrain.packages import installed_version

FRESH = find_spec("deepspeed") is not None
"""Ranks are interpreters of their own where others would be forks of one that has imported DeepSpeed."""
pytestmark = pytest.mark.skipif(installed_version("megatron-core") is None, reason="megatron-core is not installed; make test-engines")
STEPS, FACTOR = 8, 5.0
NUDGES = 3
NORM, GRADIENT = 3e-6, 1e-5
"""Largest relative differences in float32, of the global norm and of a gradient; 2.8e-6 was measured of gradients."""
BF16 = [
    Row({}),
    Row({}, "grouped MoE"),
    Row({"tp": 2}),
    Row({"dp_shard": 2}),
    Row({"pp": 2}, "4 layers, tied", schedule("interleaved", 2)),
    Row({"tp": 2, "ep": 2}, "MoE"),
]
EXPERTS = [row for row in ROWS if "MoE" in row.model or "balanced" in row.model or "BigMac" in row.model]


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    """One-process runs by name."""
    scenarios = {}
    for row in ROWS:
        for name, scenario in references(row).items():
            if not name.endswith("fp64") and not any(name.endswith(f"nudged {seed}") for seed in range(NUDGES, 9)):
                scenarios[name] = scenario | {"stop": STEPS}
    scenarios |= {f"{row.reference} | bf16": Row({}, row.model).scenario("bf16", stop=STEPS) for row in BF16}
    return worlds.run_world("sameness:train_all", 1, args={"scenarios": scenarios}, folder=tmp_path_factory.mktemp("native"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The rows under megatron, by name, and the faults."""
    of_ranks: dict[int, dict] = {}
    for row in ROWS:
        of_ranks.setdefault(row.shape.world, {})[row.name] = row.scenario("fp32", stop=STEPS)
    for row in BF16:
        of_ranks[row.shape.world][f"{row.name} | bf16"] = row.scenario("bf16", stop=STEPS)
    for fault, (_, row) in FAULTS.items():
        of_ranks[row.shape.world][fault] = row.scenario("fp32", stop=2, fault=fault)
    found = {}
    for ranks, scenarios in of_ranks.items():
        folder = tmp_path_factory.mktemp(f"ranks{ranks}")
        found |= worlds.run_world("megatron_world:train_all", ranks, args={"scenarios": scenarios}, folder=folder, fresh=FRESH)
    return found


def compared(name: str, row, runs, native) -> list:
    """The differences of a run from one native process; rounding says how far losses may be."""
    reference = native[f"{row.reference} | fp32"]
    others = [native[f"{row.reference} | {kind}"] for kind in ("control", *(f"nudged {seed}" for seed in range(NUDGES)))]
    allowed = FACTOR * max(loss_difference(other, reference) for other in others)
    return list(differences(runs[name], reference, loss=allowed, norm=NORM, gradient=GRADIENT))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_row_trains_as_one_native_process(row, runs, native):
    found = compared(row.name, row, runs, native)
    say(row.name, found)
    assert [one for one in found if not one.within] == []
    assert runs[row.name]["agree"], "ranks have different logits"


@pytest.mark.parametrize("row", EXPERTS, ids=lambda row: row.name)
def test_how_experts_are_used_is_reported_as_the_engine_native_does(row, runs, native):
    run, one = runs[row.name], native[f"{row.reference} | fp32"]
    assert run["choices"] == one["choices"]
    theirs, ours = numbers(run["metrics"][0]), numbers(one["metrics"][0])
    assert len(ours) > 1 + 2 * len(one["choices"]) - 1 and theirs == pytest.approx(ours, rel=1e-5)
    assert run["metrics"][1]["experts"].get("bias") == one["metrics"][1]["experts"].get("bias")


@pytest.mark.parametrize("row", BF16, ids=lambda row: row.name)
def test_in_16_bits_it_differs_less_than_they_do_from_32(row, runs, native):
    run, one, exact = runs[f"{row.name} | bf16"], native[f"{row.reference} | bf16"], native[f"{row.reference} | fp32"]
    whole = {}
    for what, pair in {"ours": (run, one), "16 bits": (one, exact)}.items():
        a, b = (np.concatenate([part["gradients"][name].ravel() for name in sorted(exact["gradients"])]) for part in pair)
        whole[what] = np.linalg.norm(a - b) / np.linalg.norm(b), loss_difference(*pair)
    print(row.name, whole)
    assert run["agree"] and run["gradients"].keys() == exact["gradients"].keys()
    assert whole["16 bits"][0] > 1e-3, "the engine native is in 16 bits"
    (gradient, loss), (least, losses) = whole["ours"], whole["16 bits"]
    assert gradient <= 1.5 * least and loss <= FACTOR * losses, "8 steps make more of rounding than one does"


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_mark_is_seen(fault, runs, native):
    _, row = FAULTS[fault]
    off = {one.of or one.measure: one.found for one in compared(fault, row, runs, native) if not one.within}
    if fault == "norm alone":
        assert off.keys() - {"loss"} == {"norm", "blocks.1.attention_norm.weight"} and off["blocks.1.attention_norm.weight"] > 0.1
    elif fault == "cut unmarked":
        assert off.keys() <= {"norm", "loss"} and off["norm"] > 1e-3
    else:
        assert {name for name in off if "." in name} == {name for name in runs[fault]["gradients"] if ".experts." in name}
        assert min(found for name, found in off.items() if "." in name) > 0.1
