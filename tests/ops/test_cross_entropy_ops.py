"""Fused cross-entropy: against the formula, and that its gradients are those of the loss as used."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from llmtrain.ops.cross_entropy import cross_entropy_chunked, cross_entropy_reference

IMPLEMENTATIONS = [cross_entropy_reference, cross_entropy_chunked]


def formula(hidden, weight, targets):
    """Sum of log(sum exp) - logit over rows with a target, with the gradients (p - onehot) written out."""
    hidden, weight = hidden.detach().double(), weight.detach().double()
    logits = hidden @ weight.T
    kept = targets != -100
    loss = (logits.exp().sum(1).log() - logits.gather(1, targets.clamp(min=0)[:, None])[:, 0])[kept].sum()
    slope = logits.exp() / logits.exp().sum(1, keepdim=True)
    slope[kept, targets[kept]] -= 1
    slope[~kept] = 0
    return loss, slope @ weight, slope.T @ hidden


def tensors(rows, width=5, vocab=13, dtype=torch.float64):
    hidden = torch.randn(rows, width).to(dtype).requires_grad_()
    weight = torch.randn(vocab, width).to(dtype).requires_grad_()
    return hidden, weight


@pytest.mark.parametrize("cross_entropy", IMPLEMENTATIONS)
@settings(max_examples=40, deadline=None)
@given(targets=st.lists(st.integers(0, 12) | st.just(-100), min_size=1, max_size=9), chunk=st.integers(1, 10), scale=st.floats(-3, 3))
def test_loss_and_gradients_are_the_formulas(cross_entropy, targets, chunk, scale):
    targets = torch.tensor(targets)
    hidden, weight = tensors(len(targets))
    loss = cross_entropy(hidden, weight, targets, chunk=chunk)
    (loss * scale).backward()
    expected, grad_hidden, grad_weight = formula(hidden, weight, targets)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(hidden.grad, grad_hidden * scale, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(weight.grad, grad_weight * scale, rtol=1e-9, atol=1e-12)


def test_gradcheck_runs_the_backward_pass_more_than_once():
    hidden, weight = tensors(7)
    targets = torch.tensor([3, -100, -100, -100, 0, 12, 5])
    assert gradcheck(lambda h, w: cross_entropy_chunked(h, w, targets, chunk=2), (hidden, weight))


@pytest.mark.parametrize("wanted", ["hidden", "weight"])
def test_a_tensor_that_wants_no_gradient_gets_none(wanted):
    hidden, weight = tensors(6)
    targets = torch.randint(0, 13, (6,))
    (hidden if wanted == "weight" else weight).requires_grad_(False)
    cross_entropy_chunked(hidden, weight, targets, chunk=4).backward()
    _, grad_hidden, grad_weight = formula(hidden, weight, targets)
    for tensor, grad in ((hidden, grad_hidden), (weight, grad_weight)):
        assert (tensor.grad is None) == (not tensor.requires_grad)
        if tensor.grad is not None:
            torch.testing.assert_close(tensor.grad, grad)


def test_without_grad_the_loss_is_the_same_and_nothing_is_kept():
    hidden, weight = tensors(6)
    targets = torch.tensor([1, 2, -100, 4, 5, 6])
    with torch.no_grad():
        loss = cross_entropy_chunked(hidden, weight, targets, chunk=4)
    assert loss.grad_fn is None
    torch.testing.assert_close(loss, formula(hidden, weight, targets)[0])


@pytest.mark.parametrize("cross_entropy", IMPLEMENTATIONS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
def test_narrow_dtypes_sum_the_loss_in_fp32(cross_entropy, dtype, tolerance):
    torch.manual_seed(0)
    hidden, weight = tensors(64, width=16, vocab=50, dtype=dtype)
    targets = torch.randint(0, 50, (64,))
    loss = cross_entropy(hidden, weight, targets, chunk=16)
    loss.backward()
    expected, grad_hidden, grad_weight = formula(hidden, weight, targets)
    assert loss.dtype == torch.float32 and hidden.grad.dtype == weight.grad.dtype == dtype
    for got, want in ((loss, expected), (hidden.grad, grad_hidden), (weight.grad, grad_weight)):
        assert (got.double() - want).norm() <= tolerance * want.norm()


def test_a_bf16_weight_loses_nothing_to_many_chunks():
    """Summed in bf16, 512 equal contributions would stop growing at 256."""
    hidden = torch.ones(512, 1, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    cross_entropy_chunked(hidden, weight, torch.zeros(512, dtype=torch.long), chunk=1).backward()
    assert weight.grad.flatten().tolist() == [-256.0, 256.0]


def test_mixed_dtypes_compute_in_the_hidden_dtype():
    hidden, _ = tensors(8, dtype=torch.bfloat16)
    _, weight = tensors(8, dtype=torch.float32)
    targets = torch.randint(0, 13, (8,))
    cross_entropy_chunked(hidden, weight, targets, chunk=3).backward()
    assert (hidden.grad.dtype, weight.grad.dtype) == (torch.bfloat16, torch.float32)


def test_logits_never_exist_whole():
    from torch.utils._python_dispatch import TorchDispatchMode

    sizes = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(x.untyped_storage().nbytes() for x in (out if isinstance(out, tuple) else (out,)) if isinstance(x, torch.Tensor))
            return out

    hidden, weight = tensors(256, width=8, vocab=1000, dtype=torch.float32)
    with Watch():
        cross_entropy_chunked(hidden, weight, torch.randint(0, 1000, (256,)), chunk=16).backward()
    assert max(sizes) == 16 * 1000 * 4


@pytest.mark.parametrize(("chunk", "rows", "message"), [(0, 4, "train.loss_chunk"), (2, 5, r"needed \[N,D\]")])
def test_misuse_is_refused(chunk, rows, message):
    hidden, weight = tensors(4)
    with pytest.raises(ValueError, match=message):
        cross_entropy_chunked(hidden, weight, torch.zeros(rows, dtype=torch.long), chunk=chunk)


def test_large_logits_do_not_overflow():
    hidden = torch.tensor([[1000.0]], requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0]], requires_grad=True)
    loss = cross_entropy_chunked(hidden, weight, torch.tensor([1]), chunk=1)
    loss.backward()
    assert loss.item() == 2000.0 and hidden.grad.item() == 2.0
