"""Norms, RoPE and activations: every implementation against a formula written here."""

import math

import pytest
import torch
from torch.autograd import gradcheck

from llmtrain.ops import Call, KernelUnavailable, choose, implementations, register, resolve
from llmtrain.ops.norm import add_rms_norm_reference
from llmtrain.ops.registry import unregister


def on_cpu(op):
    """Those that serve in float64 here; kernels in Triton are interpreted on a CPU and have tests of their own."""
    return [entry for entry in implementations(op) if entry.refusal(Call("cpu", torch.float64)) is None]


def functions(op):
    return [pytest.param(entry.function, id=entry.name) for entry in on_cpu(op)]


def rms_norm(x, weight, eps):
    return torch.stack([row / math.sqrt(float((row**2).sum()) / len(row) + eps) for row in x.flatten(0, -2)]).view_as(x) * weight


def layer_norm(x, weight, bias, eps):
    mean = x.sum(-1, keepdim=True) / x.shape[-1]
    variance = ((x - mean) ** 2).sum(-1, keepdim=True) / x.shape[-1]
    return (x - mean) / (variance + eps) ** 0.5 * weight + bias


def rope(x, cos, sin):
    out = torch.empty_like(x)
    half = x.shape[-1] // 2
    for i in range(half):
        out[..., i] = x[..., i] * cos[..., i] - x[..., i + half] * sin[..., i]
        out[..., i + half] = x[..., i + half] * cos[..., i + half] + x[..., i] * sin[..., i + half]
    return out


def swiglu(gate, up):
    return gate / (1 + (-gate).exp()) * up


def gelu(x):
    return torch.tensor([0.5 * v * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))) for v in x.flatten().tolist()]).view(
        x.shape
    )


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def angles(rows=1):
    angle = torch.randn(rows, 1, 5, 3, dtype=torch.float64)
    return torch.cat((angle, angle), -1).cos(), torch.cat((angle, angle), -1).sin()


CASES = {
    "rms_norm": (rms_norm, lambda: (randn(2, 3, 8), randn(8), 1e-3)),
    "layer_norm": (layer_norm, lambda: (randn(2, 3, 8), randn(8), randn(8), 1e-3)),
    "rope": (rope, lambda: (randn(2, 3, 5, 6), *angles())),
    "swiglu": (swiglu, lambda: (randn(3, 7), randn(3, 7))),
    "gelu": (gelu, lambda: (randn(3, 7),)),
}
ALL = [pytest.param(op, entry.function, id=f"{op}-{entry.name}") for op in CASES for entry in on_cpu(op)]


@pytest.mark.parametrize(("op", "function"), ALL)
def test_fp64_is_the_formula_and_the_gradient_is_its_own(op, function):
    torch.manual_seed(0)
    expected, make = CASES[op]
    inputs = make()
    with torch.no_grad():
        torch.testing.assert_close(function(*inputs), expected(*inputs).double(), rtol=1e-7 if op == "gelu" else 1e-12, atol=1e-7)
    assert gradcheck(lambda *tensors: function(*tensors, *inputs[len(tensors) :]), [x for x in inputs if isinstance(x, torch.Tensor)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("op", "function"), ALL)
def test_narrow_dtypes_come_back_narrow_and_close(op, function, dtype):
    torch.manual_seed(0)
    inputs = CASES[op][1]()
    narrow = [x.detach().to(dtype) if isinstance(x, torch.Tensor) else x for x in inputs]
    out = function(*narrow)
    wide = CASES[op][0](*[x.double() if isinstance(x, torch.Tensor) else x for x in narrow]).double()
    assert out.dtype == dtype
    # Norms compute in fp32, so a 16-bit result is rounded once; other products round twice more, and in fp32 every step counts.
    roundings = 8 if dtype == torch.float32 else 1.01 if op.endswith("norm") else 4
    assert ((out.double() - wide).abs() <= roundings * torch.finfo(dtype).eps * wide.abs().clamp(min=0.5)).all()


@pytest.mark.parametrize("op", ["rms_norm", "layer_norm"])
def test_norms_agree_in_bf16_with_an_fp32_weight(op):
    """Both compute in fp32: one unit in the last place of bf16 is all that rounding the weight can add."""
    torch.manual_seed(0)
    x, shift = torch.randn(64, 128).bfloat16() * 300, torch.zeros(128)
    weight = torch.ones(128) * 0.5
    args = (x, weight, 1e-6) if op == "rms_norm" else (x, weight, shift, 1e-6)
    first, *others = [entry.function(*args) for entry in on_cpu(op)]
    for other in others:
        torch.testing.assert_close(first, other, rtol=2**-8, atol=0)


@pytest.mark.parametrize("function", functions("rope"))
def test_rope_keeps_lengths_and_takes_angles_per_row(function):
    x = torch.randn(2, 3, 5, 6, dtype=torch.float64)
    cos, sin = angles(rows=2)
    out = function(x, cos, sin)
    torch.testing.assert_close(out.norm(dim=-1), x.norm(dim=-1))
    for row in range(2):
        torch.testing.assert_close(out[row : row + 1], function(x[row : row + 1], cos[row : row + 1], sin[row : row + 1]))


@pytest.mark.parametrize("function", functions("rope"))
def test_rope_computes_in_fp32_when_the_angles_are_fp32(function):
    x = torch.randn(1, 1, 5, 6).bfloat16()
    cos, sin = (a.float() for a in angles())
    out = function(x, cos, sin)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, rope(x.double(), cos.double(), sin.double()).bfloat16(), rtol=2**-8, atol=0)


@pytest.mark.parametrize("function", functions("layer_norm"))
def test_layer_norm_without_a_bias(function):
    x, weight = torch.randn(4, 8), torch.rand(8)
    torch.testing.assert_close(function(x, weight, None, 1e-5), layer_norm(x, weight, torch.zeros(8), 1e-5))


@pytest.mark.parametrize("name", ["reference", "native", "closed_form"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_add_rms_norm_has_the_bits_of_a_sum_and_the_chosen_norm(name, dtype):
    ops = resolve({"rms_norm": name}, Call(device="cpu", dtype=dtype))
    x, residual, weight = (torch.randn(*shape, dtype=dtype, requires_grad=True) for shape in ((2, 3, 8), (2, 3, 8), (8,)))
    normed, total = ops.add_rms_norm(x, residual, weight, 1e-3)
    plain_total = residual + x
    plain = ops.rms_norm(plain_total, weight, 1e-3)
    assert torch.equal(normed, plain) and torch.equal(total, plain_total)
    pairs = (normed, total), (plain, plain_total)
    grads = [torch.autograd.grad((n * n).sum() + 3 * t.sum(), (x, residual, weight)) for n, t in pairs]
    assert all(torch.equal(got, expected) for got, expected in zip(*grads))


def test_add_rms_norm_by_the_formula():
    x, residual, weight = (t.detach() for t in (randn(2, 3, 8), randn(2, 3, 8), randn(8)))
    normed, total = add_rms_norm_reference(x, residual, weight, 1e-3)
    torch.testing.assert_close(normed, rms_norm(x + residual, weight, 1e-3), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(total, x + residual)


def test_add_rms_norm_follows_rms_norm_unless_named():
    call = Call(device="cpu", dtype=torch.float32)
    names = {norm: resolve({"rms_norm": norm}, call).choices["add_rms_norm"].name for norm in ("auto", "reference", "native")}
    assert names == {"auto": "separate", "reference": "reference", "native": "separate"}
    named = resolve({"rms_norm": "native", "add_rms_norm": "reference"}, call).choices["add_rms_norm"]
    assert named.name == "reference" and named.reason == "named in the configuration"


def test_a_plugins_norm_serves_the_sum_too_and_a_refusal_is_told():
    register("rms_norm", "mine", speed=99)(lambda x, weight, eps: x * 7)
    register("add_rms_norm", "mine", speed=99, dtypes=(torch.bfloat16,))(lambda *_: None)
    try:
        ops = resolve({}, Call(device="cpu", dtype=torch.float32))
        assert ops.choices["add_rms_norm"].rejected == {"mine": "serves bfloat16, not float32"}
        assert ops.add_rms_norm(torch.ones(2), torch.ones(2), None, 0.0)[0].tolist() == [14.0, 14.0]
        assert resolve({}, Call(device="cpu", dtype=torch.bfloat16)).choices["add_rms_norm"].name == "mine"
    finally:
        unregister("rms_norm", "mine")
        unregister("add_rms_norm", "mine")


@pytest.mark.parametrize("op", ["attention", "rms_norm", "add_rms_norm", "rope", "swiglu", "grouped_mm", "permute", "cross_entropy"])
def test_without_torch_npu_its_operators_say_so(op):
    with pytest.raises(KernelUnavailable, match=rf"kernels.{op}=torch_npu: torch_npu needs torch_npu, which is loaded when an NPU"):
        choose(op, Call(device="npu", dtype=torch.float32), "torch_npu")
    with pytest.raises(KernelUnavailable, match="runs on npu, not on cpu"):
        choose(op, Call(device="cpu", dtype=torch.float32), "torch_npu")
