"""torch's own DistributedDataParallel over two NPUs (`hccl`), around llmtrain's model: for people whose loop is theirs."""

import pytest
from npu_world import SITE, SUPPORT
from sameness import gradient_difference, loss_difference
from worlds import run_world

STEPS = 4
BOUNDS = {"fp64": (1e-6, 1e-9), "fp32": (1e-5, 1e-4)}
"""Relative differences of losses, which are summed in float32, and of gradients: plain kernels in float64, fused ones in float32."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """By precision: the runs of two NPUs and of one CPU process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{SITE}:{SUPPORT}")
        patch.setenv("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
        args = {"precisions": list(BOUNDS), "steps": STEPS}
        npu = run_world("ddp_world:train_all", 2, args=args | {"kind": "npu"}, folder=tmp_path_factory.mktemp("npu"), fresh=True)
        cpu = run_world("ddp_world:train_all", 1, args=args | {"kind": "cpu"}, folder=tmp_path_factory.mktemp("cpu"), fresh=True)
    return {precision: (npu[precision], cpu[precision]) for precision in BOUNDS}


@pytest.mark.parametrize("precision", BOUNDS)
def test_two_npus_train_as_one_cpu_does(runs, precision):
    run, alone = runs[precision]
    losses, gradients = BOUNDS[precision]
    assert len(run["losses"]) == STEPS and run["losses"][-1] < run["losses"][0]
    assert loss_difference(run, alone) < losses
    assert gradient_difference(run, alone) < gradients
