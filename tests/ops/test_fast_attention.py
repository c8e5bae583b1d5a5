"""The entries in Triton: where they serve, where not and why, and that `auto` leaves them alone."""

import sys

import pytest
import torch
from llmtrain_kernels import triton_attention
from llmtrain_kernels.triton_attention import available, tiles

from llmtrain.ops import Call, KernelUnavailable, Mask, choose, implementations
from llmtrain.ops.fast_attention import UNMEASURED

ENTRIES = {"attention": "fast", "rms_norm": "triton", "rope": "triton", "swiglu": "triton"}
HOPPER = Call("cuda", torch.bfloat16, capability=(9, 0), head_dim=128)


@pytest.fixture
def triton_here(monkeypatch):
    """As if the package were installed and the interpreter off."""
    find = available.importlib.util.find_spec
    monkeypatch.setattr(available.importlib.util, "find_spec", lambda name: object() if name == "triton" else find(name))
    monkeypatch.delenv(available.INTERPRETER, raising=False)


@pytest.mark.parametrize(("op", "name"), ENTRIES.items())
def test_auto_takes_none_of_them(op, name, triton_here):
    assert choose(op, HOPPER, name).name == name
    assert choose(op, HOPPER).name != name
    speeds = {entry.name: entry.speed for entry in implementations(op)}
    assert speeds[name] == UNMEASURED < speeds["reference"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (Call("cpu", torch.float32), "fast runs on the CPU in Triton's interpreter only.* TRITON_INTERPRET=1"),
        (Call("cuda", torch.float16, capability=(7, 0)), "needs compute capability 8.0, not 7.0"),
        (Call("cuda", torch.float64, capability=(9, 0)), "not float64"),
        (Call("cuda", torch.bfloat16, capability=(9, 0), head_dim=512), "head dims up to 256, not 512"),
    ],
)
def test_it_says_what_it_cannot_serve(call, message, triton_here):
    with pytest.raises(KernelUnavailable, match=message):
        choose("attention", call, "fast")


def test_without_triton_it_names_the_package(monkeypatch):
    monkeypatch.setattr(available.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(KernelUnavailable, match="fast needs the package triton;"):
        choose("attention", HOPPER, "fast")
    with pytest.raises(KernelUnavailable, match="fast needs the package triton-ascend"):
        choose("attention", Call("npu", torch.bfloat16), "fast")
    with pytest.raises(RuntimeError, match="attention in Triton needs the package triton"):
        q = torch.randn(1, 1, 4, 16)
        triton_attention.attention(q, q, q, mask=Mask())


@pytest.mark.parametrize(
    ("name", "reason"), [("Ascend910B2", None), ("Ascend910_9391", None), ("Ascend310P3", "has no tiles for Ascend310P3")]
)
def test_an_npu_needs_tiles(name, reason, triton_here, monkeypatch):
    monkeypatch.setattr(available, "chip", lambda kind: tiles.ascend_chip(name))
    call = Call("npu", torch.bfloat16)
    if reason is None:
        assert choose("attention", call, "fast").name == "fast"
        return
    with pytest.raises(KernelUnavailable, match=reason):
        choose("attention", call, "fast")


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)])
def test_every_gpu_from_sm_80_on_has_tiles(capability):
    for kernel in tiles.KERNELS:
        for size in (2, 4):
            for d, dv in ((64, 64), (96, 96), (128, 128), (192, 128), (256, 256)):
                found = tiles.tile(tiles.cuda_chip(capability), kernel, d=d, dv=dv, itemsize=size)
                assert found.queries >= 16


def test_importing_the_ops_imports_no_triton():
    import subprocess

    code = "import sys, llmtrain.ops; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
