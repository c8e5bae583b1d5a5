"""The kernels in Triton, compiled for GPUs that are not there. What was found is recorded here; no GPU has run them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="needs the package triton: make test-kernels")
SUPPORT = Path(__file__).parent / "support"
SHARED = {80: 163 << 10, 90: 227 << 10}
"""Bytes of shared memory that a block may have (CUDA programming guide, table of compute capabilities)."""

PRODUCTS = {80: "mma.sync.aligned.m16n8k16", 90: "wgmma.mma_async.sync.aligned.m64"}


BY_VERSION = {
    "3.6": {(90, "backward_kv", 128): 4, (90, "backward_q", 192): 192, (90, "backward_kv", 192): 16},
    "3.8": {(90, "backward_q", 192): 168},
}
SPILLED = {(90, "backward_kv", 192): 12} | BY_VERSION.get(triton.__version__.rpartition(".")[0], {})
"""Bytes a thread that ptxas of Triton 3.9 spills, and of others that came with a supported torch; nothing elsewhere."""


@pytest.mark.parametrize("capability", [80, 90])
def test_shipped_tiles_use_tensor_cores_and_spill_nothing(capability):
    run = subprocess.run([sys.executable, SUPPORT / "compile_cuda.py", str(capability), "bf16"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    results = json.loads(run.stdout)
    assert len(results) == 9
    for found in results:
        print(found)
        assert any(name.startswith(PRODUCTS[capability]) for name in found["products"]), found
        assert found["shared"] <= SHARED[capability], found
        assert found["spilled"] <= SPILLED.get((capability, found["kernel"], found["d"]), 0), found


@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_that_memory_bounds_spill_nothing(capability):
    run = subprocess.run([sys.executable, SUPPORT / "compile_pointwise.py", str(capability)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    results = json.loads(run.stdout)
    assert len(results) == 8 and {found["spilled"] for found in results.values()} == {0}, results
    # Beside 64 registers a thread, 1,024 threads fit a multiprocessor, half of what it takes.
    assert {name for name, found in results.items() if found["registers"] > 64} == {"rms_norm_backward"}, results
