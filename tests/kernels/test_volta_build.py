"""The Volta kernels compiled for sm_70 by NVRTC 12.9, without a GPU: what is in the machine code."""

import re

import cuda_tools
import pytest
from llmtrain_kernels.volta import HEAD_DIMS
from llmtrain_kernels.volta.arguments import KERNELS, THREADS
from llmtrain_kernels.volta.gpu import architecture
from llmtrain_kernels.volta.nvrtc import OLDEST, build, nvrtc

needs_nvrtc = pytest.mark.skipif(
    nvrtc() is None or OLDEST not in nvrtc().architectures, reason="no NVRTC that knows sm_70 (nvidia-cuda-nvrtc-cu12 12.9)"
)
needs_tools = pytest.mark.skipif(
    cuda_tools.tool("nvdisasm") is None, reason="no disassembler for sm_70 (python tests/kernels/support/cuda_tools.py)"
)
REGISTERS_OF_AN_SM = 65536
SHARED_OF_AN_SM = 96 << 10
"""Of V100: NVIDIA, CUDA C++ Programming Guide, table of technical specifications per compute capability, 7.0."""


def functions(width):
    """Machine code by kernel."""
    listing = cuda_tools.run("nvdisasm", "-c", build(width, "sm_70"))
    parts = re.split(r"\.section\s+\.text\.(\w+)", listing)[1:]
    return dict(zip(parts[::2], parts[1::2]))


@needs_nvrtc
@needs_tools
@pytest.mark.parametrize("width", HEAD_DIMS)
def test_tensor_cores_no_spills_and_wide_accesses(width):
    code = functions(width)
    assert code.keys() == KERNELS.keys()
    for name, text in code.items():
        products = re.findall(r"HMMA\.884\.(\w+)\.\w+\.STEP", text)
        assert len(products) >= 512 and ("F16" in products) == (name == "volta_forward_half"), name
        assert not re.search(r"\b(LDL|STL)\b", text), f"{name} spills"
        # Every access to shared memory is one of 16 bytes, the kind whose bank conflicts the host shim counts.
        assert set(re.findall(r"\b(?:LDS|STS)[.\w]*", text)) == {"LDS.U.128", "STS.128"}, name
        assert not re.search(r"\b(ATOM|ATOMS|ATOMG|RED)\b", text), f"{name} has atomics"


@needs_nvrtc
@needs_tools
@pytest.mark.parametrize("width", HEAD_DIMS)
def test_registers_stack_and_shared_memory(width):
    usage = re.findall(
        r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)",
        cuda_tools.run("cuobjdump", "-res-usage", build(width, "sm_70")),
    )
    assert {name for name, *_ in usage} == KERNELS.keys()
    for name, *numbers in usage:
        registers, stack, static_shared, local = map(int, numbers)
        assert registers <= 255 and stack == local == static_shared == 0, (name, numbers)
        blocks = 2 if width == 64 else 1
        assert KERNELS[name].shared_bytes(width) * blocks <= SHARED_OF_AN_SM and registers * THREADS * blocks <= REGISTERS_OF_AN_SM, name


@needs_nvrtc
def test_newer_gpus_are_given_ptx_of_the_oldest_architecture():
    assert architecture((7, 0)) == "sm_70" and architecture((9, 0)) == f"compute_{max(70, min(nvrtc().architectures))}"
    ptx = build(64, "compute_70").read_bytes()
    assert b"mma.sync.aligned.m8n8k4" in ptx and b".target sm_70" in ptx


@needs_nvrtc
def test_what_does_not_compile_says_so(tmp_path):
    for name in ("args.cuh", "device.cuh", "tile.cuh", "host_shim/device.h", "host_shim/shim.cpp"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    (tmp_path / "attention.cu").write_text("no such thing")
    with pytest.raises(RuntimeError, match="identifier"):
        build(64, "sm_70", tmp_path)
