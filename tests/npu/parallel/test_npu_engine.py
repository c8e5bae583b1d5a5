"""The engine on two NPUs whose collectives and products are torch_npu's joined operators, against one CPU process.

In float64, which the stand-in has and an NPU does not; and in float32, within 5 times what a unit of rounding in the initial weights
does to the CPU's own run (docs/parity.md).
"""

import pytest
from parity_rows import Row
from sameness import gradient_difference, loss_difference, routing_difference

STOP = {"stop": 6}
PAIR, EXCHANGE = ("npu_all_gather_base_mm", "npu_mm_reduce_scatter_base"), ("npu_alltoallv_gmm", "npu_gmm_alltoallv")
MESHES = {
    "tp": (Row({"tp": 2}, options={"parallel.tp_kind": "mc2"}), PAIR),
    "tp, selective": (Row({"tp": 2}, options={"parallel.tp_kind": "mc2", "train.recompute": "selective"}), PAIR),
    "tp, GPT": (Row({"tp": 2}, "GPT", {"parallel.tp_kind": "mc2"}), PAIR),
    "ep": (Row({"dp_shard": 2, "ep": 2}, "MoE", {"parallel.ep_kind": "fused"}), EXCHANGE),
    "ep, full": (Row({"dp_shard": 2, "ep": 2}, "MoE", {"parallel.ep_kind": "fused", "train.recompute": "full"}), EXCHANGE),
    "ep, shared": (Row({"dp_shard": 2, "ep": 2}, "BigMac, shared", {"parallel.ep_kind": "fused"}), EXCHANGE),
    "ep over tp": (Row({"tp": 2, "ep": 2}, "MoE", {"parallel.ep_kind": "fused", "parallel.tp_kind": "mc2"}), PAIR + EXCHANGE),
}
GRADIENTS = {"GQA": 1e-9, "GPT": 1e-9, "MoE": 1e-6, "BigMac, shared": 1e-6}
"""The formula behind npu_grouped_matmul, which gives the experts' weights their gradients, rounds to float32."""
IN_FLOAT32 = ("tp", "ep")
NUDGES = (0, 1)


@pytest.fixture(scope="module")
def npu(npu_world):
    scenarios = {f"{name} | fp64": row.scenario("fp64", device="npu", **STOP) for name, (row, _) in MESHES.items()}
    scenarios |= {f"{name} | fp32": MESHES[name][0].scenario("fp32", device="npu", **STOP) for name in IN_FLOAT32}
    return npu_world("collective_world:train_all", 2, scenarios=scenarios)


@pytest.fixture(scope="module")
def cpu(npu_world):
    """One CPU process, by (model, kind of run)."""
    scenarios = {(model, "fp64"): Row({}, model).scenario("fp64", **STOP) for model in GRADIENTS}
    for model in ("GQA", "MoE"):
        scenarios[model, "fp32"] = Row({}, model).scenario("fp32", **STOP)
        scenarios |= {(model, seed): Row({}, model).scenario("fp32", nudged=seed, **STOP) for seed in NUDGES}
    return npu_world("sameness:train_all", 1, scenarios=scenarios)


@pytest.mark.parametrize("name", MESHES)
def test_float64_is_the_same(name, npu, cpu):
    (row, operators), run = MESHES[name], npu[f"{name} | fp64"]
    alone = cpu[row.model, "fp64"]
    assert loss_difference(run, alone) < 1e-6  # losses of a world are summed in float32, since an NPU has no float64
    assert gradient_difference(run, alone) < GRADIENTS[row.model]
    assert routing_difference(run, alone)[0] == 0
    assert all(run["calls"].get(operator) for operator in operators), run["calls"]


@pytest.mark.parametrize("name", IN_FLOAT32)
def test_float32_is_within_a_unit_of_rounding(name, npu, cpu):
    (row, operators), run = MESHES[name], npu[f"{name} | fp32"]
    control = max(loss_difference(cpu[row.model, seed], cpu[row.model, "fp32"]) for seed in NUDGES)
    assert loss_difference(run, cpu[row.model, "fp32"]) <= 5 * control
    assert all(run["calls"].get(operator) for operator in operators), run["calls"]
