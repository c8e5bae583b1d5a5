"""The engine's meshes in a world of two NPUs (`hccl`), against one CPU process: the same losses, gradients and routing.

In float64, which the stand-in has and an NPU does not, with the plain kernels: what differs is the device, the groups and the mesh. In
float32 with the fused kernels that `auto` takes: within what a unit of rounding in the initial weights does to the CPU's own run.
"""

import pytest
from npu_world import SITE, SUPPORT
from parity_rows import NUDGES, Row, references
from sameness import gradient_difference, loss_difference, routing_difference
from worlds import run_world

STOP = {"stop": 4}
LOSSES_IN_FP64 = 1e-6
"""The losses of a world are summed in float32, since an NPU has no float64."""
MESHES = {
    "FSDP": Row({"dp_shard": 2}),
    "replicas": Row({"dp_replicate": 2}),
    "tp": Row({"tp": 2}),
    "tp, MoE": Row({"tp": 2}, "MoE"),
    "cp, all_gather": Row({"cp": 2}),
    "cp, ring": Row({"cp": 2}, options={"parallel.cp_kind": "ring"}),
    "cp, ulysses": Row({"cp": 2}, options={"parallel.cp_kind": "ulysses"}),
    "pp": Row({"pp": 2}),
    "ep": Row({"dp_shard": 2, "ep": 2}, "MoE"),
    "FSDP, recompute": Row({"dp_shard": 2}, options={"train.recompute": "full"}),
}
FUSED = {
    "FSDP": ("npu_fusion_attention", "npu_rms_norm", "npu_rotary_mul"),
    "cp, ring": ("npu_fusion_attention", "npu_rms_norm"),
    "pp": ("npu_fusion_attention", "npu_rms_norm", "npu_rotary_mul"),
    "ep": ("npu_fusion_attention", "npu_grouped_matmul", "npu_moe_token_permute"),
}
"""Meshes that also run in float32, and ops that every rank has to call there."""

CALLED = {
    "grouped_mm": ("ep", "npu_grouped_matmul"),
    "permute": ("ep", "npu_moe_token_permute"),
    "unpermute": ("ep", "_npu_moe_token_unpermute"),
    "attention_part": ("cp, ring", "npu_fusion_attention"),
    "attention_part_backward": ("cp, ring", "npu_fusion_attention_grad"),
}
"""Ops of the registry that the quickstart does not need -> a mesh that does, and the operator of torch_npu behind them."""


@pytest.fixture(scope="module")
def npu(tmp_path_factory):
    """Runs of two NPUs, by (mesh, precision)."""
    scenarios = {f"{name} | fp64": row.scenario("fp64", device="npu", **STOP) for name, row in MESHES.items()}
    scenarios |= {f"{name} | fp32": MESHES[name].scenario("fp32", device="npu", **STOP) for name in FUSED}
    return world("npu_world:train_all", 2, scenarios, tmp_path_factory.mktemp("npu"))


@pytest.fixture(scope="module")
def cpu(tmp_path_factory):
    """Runs of one CPU process, by the names of `references`."""
    scenarios = {}
    for row in MESHES.values():
        scenarios |= {name: scenario | STOP for name, scenario in references(row).items() if not name.endswith("control")}
    return world("sameness:train_all", 1, scenarios, tmp_path_factory.mktemp("cpu"))


def world(target: str, ranks: int, scenarios: dict, folder) -> dict:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{SITE}:{SUPPORT}")
        patch.setenv("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
        return run_world(target, ranks, args={"scenarios": scenarios}, folder=folder, fresh=True)


@pytest.mark.parametrize("name", MESHES)
def test_float64_is_the_same_on_npus(npu, cpu, name):
    run, alone = npu[f"{name} | fp64"], cpu[f"{MESHES[name].reference} | fp64"]
    assert loss_difference(run, alone) < LOSSES_IN_FP64
    assert gradient_difference(run, alone) < 1e-9
    different, choices = routing_difference(run, alone)
    assert different == 0 and (choices > 0) == (MESHES[name].model == "MoE")


@pytest.mark.parametrize("name", FUSED)
def test_float32_with_fused_kernels_is_within_a_unit_of_rounding(npu, cpu, name):
    run, kinds = (
        npu[f"{name} | fp32"],
        {kind.rsplit(" | ")[1]: found for kind, found in cpu.items() if kind.startswith(MESHES[name].reference + " |")},
    )
    control = max(loss_difference(kinds[f"nudged {seed}"], kinds["fp32"]) for seed in NUDGES)
    found = loss_difference(run, kinds["fp32"])
    print(f"{name}: {found:.2e}, a unit of rounding: {control:.2e}")
    assert found <= 5 * control
    assert all(run["calls"].get(op) for op in FUSED[name]), run["calls"]


@pytest.mark.parametrize(
    ("mesh", "operator"), [pytest.param(*run, marks=pytest.mark.npu_check(op, "2-process"), id=op) for op, run in CALLED.items()]
)
def test_both_ranks_call_the_fused_operator(npu, mesh, operator):
    assert npu[f"{mesh} | fp32"]["calls"].get(operator, 0) >= STOP["stop"]


def test_a_fault_shows(npu, cpu):
    """The bounds above are not so wide that nothing exceeds them."""
    other = cpu[f"{MESHES['tp'].reference} | nudged 0"]
    assert gradient_difference(npu["tp | fp64"], other) > 1e-9
