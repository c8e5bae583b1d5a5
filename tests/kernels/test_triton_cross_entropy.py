"""Cross-entropy in Triton's interpreter: the softmax of given logits, and the op with its head, against float64."""

import interpreted  # noqa: F401 - Triton serves here, or all of this is skipped
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from llmtrain_kernels import triton_pointwise
from llmtrain_kernels.triton_pointwise import cross_entropy as module

from llmtrain.ops.triton_pointwise import cross_entropy_triton

STEPS = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
"""Bounds of the gradient, whose numbers are between -1 and 1: half a step of the dtype, and in fp32 the order of sums."""

WITH_HEAD = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
"""Of the norm, with a head in the dtype: logits are rounded to it."""

DTYPES = st.sampled_from(list(STEPS))
DRAWN = settings(max_examples=25, deadline=None)


@pytest.fixture(autouse=True, scope="module")
def small_blocks():
    """So that a small vocabulary takes several."""
    block, module.BLOCK = module.BLOCK, 64
    yield
    module.BLOCK = block


@DRAWN
@given(rows=st.integers(1, 5), vocab=st.integers(1, 200), dtype=DTYPES, scale=st.sampled_from((0.1, 3.0, 300.0)), seed=st.integers(0, 99))
def test_losses_and_gradients_of_logits(rows, vocab, dtype, scale, seed):
    torch.manual_seed(seed)
    logits, target = (torch.randn(rows, vocab) * scale).to(dtype), torch.randint(0, vocab, (rows,))
    wide = logits.double().requires_grad_()
    want = F.cross_entropy(wide, target, reduction="none")
    (slope,) = torch.autograd.grad(want.sum(), wide)
    kept = logits.clone()
    for wanted in (False, True):
        losses = triton_pointwise.softmax_losses(logits, target, slope=wanted)
        assert losses.dtype == torch.float32
        assert ((losses - want).abs() <= 2e-6 * wide.abs().amax(1).clamp(min=1.0)).all()
        assert torch.equal(logits, kept) or wanted
    exponents = 2**-24 * wide.abs().max()  # rounding of logit - log-sum-exp in fp32, to which a probability's relative error is equal
    assert (logits.double() - slope).abs().max() <= STEPS[dtype] + exponents


@DRAWN
@given(
    targets=st.lists(st.integers(0, 129) | st.just(-100), min_size=1, max_size=9),
    width=st.integers(1, 20),
    chunk=st.integers(1, 10),
    dtype=DTYPES,
    wide_weight=st.booleans(),
    factor=st.floats(-3, 3).filter(lambda x: abs(x) > 0.1),
)
def test_the_op_with_its_head(targets, width, chunk, dtype, wide_weight, factor):
    targets = torch.tensor(targets)
    hidden = torch.randn(len(targets), width).to(dtype).requires_grad_()
    weight = torch.randn(130, width).div(width**0.5).to(torch.float32 if wide_weight else dtype).requires_grad_()
    loss = cross_entropy_triton(hidden, weight, targets, chunk=chunk)
    (loss * factor).backward()
    wide = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    want = F.cross_entropy(wide[0] @ wide[1].T, targets, reduction="sum", ignore_index=-100)
    (want * factor).backward()
    assert loss.dtype == torch.float32 and (hidden.grad.dtype, weight.grad.dtype) == (hidden.dtype, weight.dtype)
    for got, exact in ((loss, want), (hidden.grad, wide[0].grad), (weight.grad, wide[1].grad)):
        assert (got.double() - exact).norm() <= WITH_HEAD[dtype] * exact.norm()


def test_targets_outside_the_vocabulary_and_broken_logits_show():
    logits = torch.randn(4, 5)
    logits[3, 2] = float("nan")
    losses = triton_pointwise.softmax_losses(logits, torch.tensor([4, 5, -1, 0]), slope=False)
    assert losses.isnan().tolist() == [False, True, True, True]


def test_hidden_words_have_no_share():
    logits = torch.tensor([[float("-inf"), 1.0, float("-inf"), 1.0]])
    losses = triton_pointwise.softmax_losses(logits, torch.tensor([1]), slope=True)
    torch.testing.assert_close(losses, torch.tensor([2.0]).log())
    torch.testing.assert_close(logits, torch.tensor([[0.0, -0.5, 0.0, 0.5]]))


@pytest.mark.parametrize(
    ("logits", "target", "message"),
    [
        (torch.ones(2, 3), torch.zeros(3, dtype=torch.int64), r"needed \[n,V\]"),
        (torch.ones(3, 2).t(), torch.zeros(2, dtype=torch.int64), "contiguous rows"),
        (torch.ones(2, 3, dtype=torch.float64), torch.zeros(2, dtype=torch.int64), "float64; needed"),
    ],
)
def test_what_does_not_fit_is_refused(logits, target, message):
    with pytest.raises(ValueError, match=message):
        triton_pointwise.softmax_losses(logits, target, slope=False)
