"""RMSNorm, rotary embedding and SwiGLU in Triton's interpreter, against their formulas in float64, which autograd differentiates."""

import interpreted  # noqa: F401 - Triton serves here, or all of this is skipped
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from llmtrain_kernels import triton_pointwise
from llmtrain_kernels.triton_pointwise import norm

BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
"""In units of the largest number: about half a step of the dtype, and in fp32 the order of sums."""

DTYPES = st.sampled_from(list(BOUNDS))
DRAWN = settings(max_examples=15, deadline=None)


def rms_norm(x, weight):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def rope(x, cos, sin):
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def swiglu(gate, up):
    return F.silu(gate) * up


def check(ours, formula, tensors, wanted):
    """Output and the gradients of the first `wanted` tensors."""
    narrow = [x.detach().requires_grad_(index < wanted) for index, x in enumerate(tensors)]
    wide = [x.detach().double().requires_grad_(index < wanted) for index, x in enumerate(tensors)]
    out, expected = ours(*narrow), formula(*wide)
    grad = torch.randn_like(out)
    got = [out, *torch.autograd.grad(out, narrow[:wanted], grad)]
    want = [expected, *torch.autograd.grad(expected, wide[:wanted], grad.double())]
    assert out.dtype == tensors[0].dtype
    for a, b in zip(got, want):
        error = (a.double() - b).abs().max() / b.abs().max().clamp(min=1.0)
        assert error <= BOUNDS[a.dtype], error


@DRAWN
@given(rows=st.integers(1, 9), width=st.integers(1, 70), dtype=DTYPES, wide_weight=st.booleans(), seed=st.integers(0, 99))
def test_rms_norm(rows, width, dtype, wide_weight, seed):
    torch.manual_seed(seed)
    programs, norm.PROGRAMS = norm.PROGRAMS, 2
    try:
        weight = torch.randn(width, dtype=torch.float32 if wide_weight else dtype)
        check(lambda x, w: triton_pointwise.rms_norm(x, w, 1e-6), rms_norm, [torch.randn(rows, 2, width).to(dtype), weight], 2)
    finally:
        norm.PROGRAMS = programs


@DRAWN
@given(
    rows=st.integers(1, 3), shared=st.booleans(), length=st.integers(1, 70), half=st.integers(1, 40), dtype=DTYPES, strided=st.booleans()
)
def test_rope(rows, shared, length, half, dtype, strided):
    x = torch.randn(rows, length, 2, 2 * half).to(dtype).transpose(1, 2)
    angles = torch.rand(1 if shared else rows, 1, length, 2 * half) * 6
    check(triton_pointwise.rope, rope, [x if strided else x.contiguous(), angles.cos(), angles.sin()], 1)


@DRAWN
@given(rows=st.integers(1, 3), width=st.integers(1, 1500), dtype=DTYPES)
def test_swiglu(rows, width, dtype):
    check(triton_pointwise.swiglu, swiglu, [torch.randn(rows, width).to(dtype) for _ in range(2)], 2)


def test_they_are_operators_that_compiled_code_leaves_whole():
    x, angles = torch.randn(2, 3, 5, 8, requires_grad=True), torch.rand(1, 1, 5, 8)
    weight = torch.randn(8, requires_grad=True)

    def block(x, weight):
        turned = triton_pointwise.rope(triton_pointwise.rms_norm(x, weight, 1e-6), angles.cos(), angles.sin())
        return triton_pointwise.swiglu(turned, x).square().sum()

    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    for got, want in zip(*(torch.autograd.grad(f(x, weight), (x, weight)) for f in (compiled, block))):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: triton_pointwise.rms_norm(x, torch.ones(3), 1e-6), r"needed \[..,D\] and \[D\]"),
        (lambda x: triton_pointwise.rope(x, x, x), r"\[B or 1,1,S,d\]"),
        (lambda x: triton_pointwise.swiglu(x, x[..., :2]), "equal shapes"),
        (lambda x: triton_pointwise.swiglu(x.double(), x.double()), "float64; needed"),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.randn(2, 2, 3, 4))
