"""megatron-core itself, of the version that the engine runs and of the one that Ascend's stack pins, against what was recorded of it; and a
checkpoint in its distributed format, written by itself."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llmtrain.convert.megatron_files import plain_names
from llmtrain.packages import installed_version
from llmtrain.tools.megatron_source import DistributedFiles

ROOT = Path(__file__).parents[2]
SUPPORT = ROOT / "tests/support"
RECORD = json.loads((ROOT / "tests/convert/recorded/megatron_core_0.12.1.json").read_text())["models"]
OLD = os.environ.get("LLMTRAIN_MEGATRON_0_12_1", "")
"""The folder that `make test-engines` installs megatron-core 0.12.1 to."""
pytestmark = pytest.mark.skipif(installed_version("megatron-core") is None, reason="megatron-core is not installed; make test-engines")


def run(script: str, *words: str, first: str = "") -> str:
    """What a script of tests/support prints, in a process of its own; `first` comes before all on its path."""
    path = os.pathsep.join(filter(None, [first, str(SUPPORT), str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, str(SUPPORT / script), *words], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("folder", ["", OLD], ids=["installed", "0.12.1"])
def test_parameters_have_the_recorded_names_and_shapes(folder, request):
    if request.node.callspec.id == "0.12.1" and not folder:
        pytest.skip("LLMTRAIN_MEGATRON_0_12_1 names no folder with megatron-core 0.12.1; make test-engines")
    found = json.loads(run("megatron_names.py", first=folder))
    assert found["version"] == ("0.12.1" if folder else installed_version("megatron-core"))
    assert found["models"] == RECORD


def test_its_own_distributed_checkpoint_is_read(tmp_path):
    run("megatron_save.py", str(tmp_path))
    source = DistributedFiles(tmp_path / "iter_0000007")
    written = plain_names(torch.load(tmp_path / "written.pt", weights_only=True))
    assert source.names == set(written) and source.args["num_layers"] == 3
    assert all(torch.equal(source.parts(name)[0], tensor) for name, tensor in written.items())
