"""Engine deepspeed over two NPUs (`hccl`): DeepSpeed's own NPU accelerator on the stand-in."""

import importlib.util

import pytest
from npu_world import SITE, SUPPORT
from sameness import gradient_difference, loss_difference, norm_difference
from worlds import run_world

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed: make test-npu installs it"
)
STAGES, STEPS = (1, 2, 3), 4
PARTITIONED = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs of two NPUs by stage, and of one CPU process."""
    engines = {stage: {"kind": "deepspeed", "zero": stage} | ({"options": PARTITIONED} if stage == 3 else {}) for stage in STAGES}
    shared = {"parallel": {"dp_shard": 2}}
    scenarios = {
        f"zero {stage}": {"changes": shared | {"engine": engine}, "device": "npu", "stop": STEPS} for stage, engine in engines.items()
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{SITE}:{SUPPORT}")
        patch.setenv("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
        folder = tmp_path_factory.mktemp
        npu = run_world("zero_npu:train_all", 2, args={"scenarios": scenarios}, folder=folder("npu"), fresh=True)
        alone = {"cpu": {"changes": {}, "stop": STEPS}}
        return npu | run_world("sameness:train_all", 1, args={"scenarios": alone}, folder=folder("cpu"), fresh=True)


@pytest.mark.parametrize("stage", STAGES)
def test_two_npus_train_as_one_cpu_does(runs, stage):
    run, alone = runs[f"zero {stage}"], runs["cpu"]
    print(f"zero {stage}: losses {loss_difference(run, alone):.1e}, gradients {gradient_difference(run, alone):.1e}")
    assert loss_difference(run, alone) < 1e-6
    assert gradient_difference(run, alone) < 1e-5
    assert norm_difference(run, alone) < 1e-5
