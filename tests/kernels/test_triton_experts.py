"""Rows sorted by expert and back in Triton's interpreter, against index arithmetic in float64, which autograd differentiates."""

import interpreted  # noqa: F401 - Triton serves here, or all of this is skipped
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llmtrain_kernels import triton_pointwise
from llmtrain_kernels.triton_pointwise import experts as module

from llmtrain.ops.experts import permute_reference
from llmtrain.ops.triton_pointwise import permute_triton, unpermute_triton

BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
"""In units of the largest number: about half a step of the dtype, and in fp32 the order of sums."""

DTYPES = st.sampled_from(list(BOUNDS))
DRAWN = settings(max_examples=25, deadline=None)
SIZES = {"tokens": st.integers(1, 6), "copies": st.integers(1, 4), "width": st.integers(1, 70)}


@pytest.fixture(autouse=True, scope="module")
def small_blocks():
    """So that narrow rows take several."""
    block, module.BLOCK = module.BLOCK, 32
    yield
    module.BLOCK = block


def close(got, want):
    error = (got.double() - want).abs().max() / want.abs().max().clamp(min=1.0)
    assert error <= BOUNDS[got.dtype], error


@DRAWN
@given(**SIZES, dtype=DTYPES, seed=st.integers(0, 99))
def test_permute(tokens, copies, width, dtype, seed):
    torch.manual_seed(seed)
    x, ids = torch.randn(tokens, width).to(dtype).requires_grad_(), torch.randint(0, 5, (tokens, copies))
    rows, order, counts = permute_triton(x, ids, 5)
    want, want_order, want_counts = permute_reference(x, ids, 5)
    assert torch.equal(rows, want) and torch.equal(order, want_order) and torch.equal(counts, want_counts)
    grad = torch.randn_like(rows)
    wide = x.detach().double().requires_grad_()
    wide.repeat_interleave(copies, 0)[order].backward(grad.double())
    rows.backward(grad.t().contiguous().t())
    close(x.grad, wide.grad)


@DRAWN
@given(**SIZES, dtype=DTYPES, wide_probs=st.booleans(), seed=st.integers(0, 99))
def test_unpermute(tokens, copies, width, dtype, wide_probs, seed):
    torch.manual_seed(seed)
    rows, order = torch.randn(tokens * copies, width).to(dtype), torch.randperm(tokens * copies)
    probs = torch.rand(tokens, copies).to(torch.float32 if wide_probs else dtype)
    narrow = [x.clone().requires_grad_() for x in (rows, probs)]
    wide = [x.double().requires_grad_() for x in (rows, probs)]
    out = unpermute_triton(narrow[0], order, narrow[1])
    each = torch.zeros(tokens * copies, width, dtype=torch.float64).index_copy(0, order, wide[0])
    want = (each.view(tokens, copies, width) * wide[1][..., None]).sum(1)
    grad = torch.randn_like(out)
    assert out.dtype == dtype
    for got, exact in zip([out, *torch.autograd.grad(out, narrow, grad)], [want, *torch.autograd.grad(want, wide, grad.double())]):
        close(got, exact)


def test_nothing_routed_is_nothing():
    rows, order, counts = permute_triton(torch.randn(0, 8), torch.zeros(0, 2, dtype=torch.int64), 3)
    assert rows.shape == (0, 8) and counts.tolist() == [0, 0, 0]
    assert unpermute_triton(rows, order, torch.zeros(0, 2)).shape == (0, 8)


def test_they_are_operators_that_compiled_code_leaves_whole():
    places = torch.randperm(8).view(4, 2)
    order = places.flatten().argsort()
    x, probs = torch.randn(4, 6, requires_grad=True), torch.rand(4, 2, requires_grad=True)

    def there_and_back(x, probs):
        return triton_pointwise.unpermute(triton_pointwise.permute(x, order, places).square(), places, probs).square().sum()

    compiled = torch.compile(there_and_back, backend="aot_eager", fullgraph=True)
    for got, want in zip(*(torch.autograd.grad(f(x, probs), (x, probs)) for f in (compiled, there_and_back))):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, places: triton_pointwise.permute(x, places.flatten()[:3], places), r"needed \[N,D\], \[N\*k\] and \[N,k\]"),
        (lambda x, places: triton_pointwise.unpermute(x, places, torch.ones(2, 2)), r"needed \[N\*k,D\], \[N,k\] and \[N,k\]"),
        (lambda x, places: triton_pointwise.unpermute(x.double(), places, torch.ones(2, 2)), "float64; needed"),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.randn(2, 3), torch.arange(4).view(2, 2))
