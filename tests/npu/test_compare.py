"""`llmtrain compare` between the CPU and an NPU: the real torch_npu, its kernels stood in for by formulas on the CPU."""

import pytest
import torch

stand_in = pytest.importorskip("stand_in", reason="the NPU tier's environment")

CONFIG = """
model:
  layers: 2
  hidden: 32
  vocab_size: 97
  attention: {heads: 4, kv_heads: 2}
  ffn: {hidden: 48}
  norm: {placement: depth_scaled_sandwich}
  init: {kind: tiny}
train: {steps: 1, seq_len: 32, global_batch: 2, micro_batch: 2}
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    stand_in.start(kernels=True, hccl=True)
    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("compare") / "config.yaml"
    path.write_text(CONFIG)
    return path


@pytest.fixture
def negated_rope():
    """A rotary kernel of the NPU that turns the wrong way."""
    from llmtrain.ops import register
    from llmtrain.ops.registry import unregister
    from llmtrain.ops.rope import rope_reference

    register("rope", "faulty", devices=("npu",), speed=-9)(lambda x, cos, sin: rope_reference(x, cos, -sin))
    yield
    unregister("rope", "faulty")


def compared(config, capsys, b: str, *more: str) -> tuple[int, str]:
    from llmtrain.tools.compare.verb import main

    code = main(["-c", str(config), "--a", "device=cpu", "--b", b, *more])
    return code, capsys.readouterr().out


def test_the_two_devices_agree(config, capsys):
    before = sum(stand_in.calls.values())
    code, out = compared(config, capsys, "device=npu")
    assert code == 0, out
    assert "device: A cpu, B npu" in out and "verdict: within the bounds at all" in out
    assert "kernels.attention: A tiled, B torch_npu" in out and sum(stand_in.calls.values()) > before, "no fused op was called"


def test_a_kernel_of_the_npu_that_is_wrong_is_found(config, capsys, negated_rope):
    code, out = compared(config, capsys, "device=npu kernels.rope=faulty")
    assert code == 1
    assert "they part first at blocks.0.rope (forward)" in out and "B faulty): B is" in out
