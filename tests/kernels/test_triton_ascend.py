"""Flash attention in Triton, compiled for Ascend without CANN: shipped tiles fit the buffers of the chip, larger ones do not.

LLMTRAIN_ASCEND_PYTHON names the Python of an environment with triton-ascend and ascendnpu-ir (make test-kernels makes one). Nothing here
runs on an NPU.
"""

import os
import subprocess
from pathlib import Path

import llmtrain_kernels
import pytest

PYTHON = os.environ.get("LLMTRAIN_ASCEND_PYTHON")
pytestmark = pytest.mark.skipif(not PYTHON, reason="needs LLMTRAIN_ASCEND_PYTHON, a Python with triton-ascend and ascendnpu-ir")


@pytest.fixture
def ascend(tmp_path):
    """Runs that Python with the kernels on its path and nothing else of this environment."""
    (tmp_path / "llmtrain_kernels").symlink_to(Path(llmtrain_kernels.__file__).parent)
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment = kept | {"PYTHONPATH": str(tmp_path), "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    return lambda *args: subprocess.run([PYTHON, *args], capture_output=True, text=True, env=environment, cwd=tmp_path)


def test_every_shipped_tile_fits_forward_and_backward(ascend):
    run = ascend("-m", "llmtrain_kernels.triton_attention.ascend", "--soc", "Ascend910B2")
    lines = run.stdout.splitlines()
    assert run.returncode == 0, run.stdout + run.stderr[-2000:]
    assert len(lines) == 40 and all(line.endswith(": fits") for line in lines)


MISFIT = """
from llmtrain_kernels.triton_attention.ascend import misfit
from llmtrain_kernels.triton_attention.tiles import Tile, tile
"""


def test_tiles_of_head_dim_128_fit_an_atlas_a3(ascend):
    sizes = 'tile("Ascend910B", kernel, d=128, dv=128, itemsize=2), d=128, dv=128, soc="Ascend910_9391"'
    run = ascend("-c", f"{MISFIT}for kernel in ('forward', 'backward_q', 'backward_kv'): print(misfit(kernel, {sizes}))")
    assert run.stdout.split() == ["None"] * 3, run.stdout + run.stderr[-2000:]


@pytest.mark.parametrize(
    ("kernel", "size", "buffer"),
    [("forward", "Tile(128, 256)", "ub"), ("backward_kv", "Tile(64, 64)", "cc"), ("backward_q", "Tile(64, 256)", "cbuf")],
)
def test_a_tile_too_large_is_refused_with_what_overflows(ascend, kernel, size, buffer):
    run = ascend("-c", f"{MISFIT}print(misfit('{kernel}', {size}, d=256, dv=256, dtype='fp32'))")
    assert f"{buffer} overflow, requires " in run.stdout, run.stdout + run.stderr[-2000:]
