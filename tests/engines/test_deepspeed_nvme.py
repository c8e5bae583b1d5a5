"""Moments, fp32 weights and parameters in files, which DeepSpeed's async_io reads and writes: the numbers and the state of engine native.

DeepSpeed swaps nothing below 1 MiB a rank, so the model is wider than elsewhere; its head norms would put what comes after them in their
group where files cannot be read to.
"""

from itertools import pairwise

import pytest
from sameness import loss_difference, merge
from worlds import run_world
from zero_world import EVERY_PARAMETER, same_bits

pytestmark = pytest.mark.deepspeed
WIDE = {"model": {"hidden": 128, "layers": 2, "ffn": {"hidden": 4096}, "attention": {"heads": 16, "kv_heads": 8}}}
GROUPS = {"zero_optimization": {"sub_group_size": 600_000}}
"""Several groups a rank, as a model has that does not fit in memory."""


def has_libaio() -> bool:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    return AsyncIOBuilder().is_compatible()


@pytest.fixture(scope="module")
def async_io():
    if not has_libaio():
        pytest.skip("DeepSpeed's async_io cannot be built: libaio's header or library is not here (apt-get install libaio-dev)")


def nvme(folder, *, params: bool = False, ranks: int = 2) -> dict:
    places = {"offload_optimizer": "nvme", "nvme_path": str(folder)} | ({"offload_params": "nvme"} if params else {})
    return {"engine": {"kind": "deepspeed", "zero": 3, "options": merge(EVERY_PARAMETER, GROUPS)} | places, "parallel": {"dp_shard": ranks}}


def test_without_libaio_it_is_said(tmp_path, monkeypatch):
    for name in ("CFLAGS", "LDFLAGS", "CPATH", "LIBRARY_PATH"):
        monkeypatch.delenv(name, raising=False)
    if has_libaio():
        pytest.skip("libaio is installed on this machine")
    args = {"changes": nvme(tmp_path), "folder": str(tmp_path), "start": 0, "steps": 1}
    with pytest.raises(AssertionError, match="offloading to nvme needs DeepSpeed's AsyncIO, and the header libaio"):
        run_world("zero_world:leg", 2, args=args, folder=tmp_path)


def test_a_run_goes_to_files_and_back(async_io, tmp_path_factory):
    files, folder = tmp_path_factory.mktemp("files"), tmp_path_factory.mktemp("run")
    legs = [nvme(files, params=True), {}, nvme(files), nvme(files, ranks=1), {}]
    found = []
    for number, changes in enumerate(legs):
        args = {"changes": merge(WIDE, changes), "folder": str(folder), "start": 2 * number, "steps": 2}
        ranks = changes.get("parallel", {}).get("dp_shard", 1)
        found.append(run_world("zero_world:leg", ranks, args=args, folder=tmp_path_factory.mktemp(f"leg-{number}")))
    for before, after in pairwise(found):
        assert same_bits(after["loaded"], before["saved"])
    swapped = {str(path.parent.parent.name) for path in files.rglob("*.swp")}
    assert "optimizer" in swapped, "nothing was in files"
    scenarios = {name: {"changes": WIDE, "stop": 10} | extra for name, extra in {"alone": {}, "control": {"permute": True}}.items()}
    runs = run_world("sameness:train_all", 1, args={"scenarios": scenarios}, folder=tmp_path_factory.mktemp("alone"))
    whole = {"losses": [loss for leg in found for loss in leg["losses"]]}
    assert loss_difference(whole, runs["alone"]) <= 5 * loss_difference(runs["control"], runs["alone"])


def test_a_discarded_step_leaves_no_trace(async_io, tmp_path):
    cases = {"fp32": nvme(tmp_path), "bf16": nvme(tmp_path) | {"precision": "bf16"}, "params": nvme(tmp_path, params=True)}
    cases = {name: merge(merge(WIDE, changes), {"train": {"micro_batch": 1}}) for name, changes in cases.items()}
    for name, found in run_world("zero_world:given_up", 2, args={"cases": cases}, folder=tmp_path).items():
        assert found["unchanged"] and found["nan"] and found["same"], name
        assert found["figures"][0] == found["figures"][1], name
