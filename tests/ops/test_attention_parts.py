"""Attention to parts of the keys: each implementation against the whole attention and its gradients."""

import pytest
import torch

from llmtrain.ops import Mask, attention_parts
from llmtrain.ops.attention import attention_reference
from llmtrain.ops.attention_parts import (
    attention_part_backward_flash,
    attention_part_backward_reference,
    attention_part_flash,
    attention_part_reference,
)

FORWARD = [attention_part_reference, attention_part_flash]
BACKWARD = [attention_part_backward_reference, attention_part_backward_flash]


@pytest.fixture(autouse=True)
def blocks_of_three(monkeypatch):
    monkeypatch.setattr(attention_parts, "BLOCK", 3)


def draw(heads, kv_heads, d, dv, dtype=torch.float64, rows=2, queries=7, keys=7):
    torch.manual_seed(0)
    sizes = [(rows, heads, queries, d), (rows, kv_heads, keys, d), (rows, kv_heads, keys, dv), (rows, heads, queries, dv)]
    return [torch.randn(size, dtype=torch.float64).to(dtype) for size in sizes]


@pytest.mark.parametrize("backward", BACKWARD)
@pytest.mark.parametrize("forward", FORWARD)
@pytest.mark.parametrize("sizes", [(2, 2, 4, 4), (4, 2, 4, 4), (4, 1, 4, 2), (2, 2, 2, 4)])
@pytest.mark.parametrize("causal", [True, False])
def test_one_part_is_attention(forward, backward, sizes, causal):
    *tensors, grad = draw(*sizes)
    leaves = [x.requires_grad_() for x in tensors]
    expected, lse = attention_reference(*leaves, mask=Mask(causal=causal), scale=0.3, return_lse=True)
    wanted = torch.autograd.grad(expected, leaves, grad)
    with torch.no_grad():
        out, total = forward(*leaves, causal=causal, scale=0.3)
        grads = backward(grad, *leaves, out, total, causal=causal, scale=0.3)
    for got, want in zip((out, total, *grads), (expected, lse, *wanted)):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("backward", BACKWARD)
@pytest.mark.parametrize("forward", FORWARD)
def test_parts_of_the_keys_make_the_whole(forward, backward):
    """The second half of the queries sees the first keys in full and its own causally, as on a ring."""
    q, k, v, grad = draw(4, 2, 4, 4, queries=4, keys=10)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    expected = attention_reference(*leaves, mask=Mask(), scale=0.3, q_offset=6)
    wanted = torch.autograd.grad(expected, leaves, grad)
    parts = [(slice(0, 6), False), (slice(6, 10), True)]
    with torch.no_grad():
        pieces = [forward(q, k[:, :, keys], v[:, :, keys], causal=causal, scale=0.3) for keys, causal in parts]
        total = torch.logaddexp(pieces[0][1], pieces[1][1])
        out = sum(part * torch.exp(lse - total).unsqueeze(-1) for part, lse in pieces)
        grads = [backward(grad, q, k[:, :, keys], v[:, :, keys], out, total, causal=causal, scale=0.3) for keys, causal in parts]
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-13)
    got = grads[0][0] + grads[1][0], *(torch.cat(pair, dim=2) for pair in list(zip(*grads))[1:])
    for found, want in zip(got, wanted):
        torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(("forward", "backward"), list(zip(FORWARD, BACKWARD)))
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_narrow_dtypes(forward, backward, dtype, tolerance):
    *tensors, grad = draw(4, 2, 8, 8, dtype=dtype, queries=33, keys=33)
    out, lse = forward(*tensors, causal=True, scale=0.3)
    assert out.dtype == dtype and lse.dtype == torch.float32
    grads = backward(grad, *tensors, out, lse, causal=True, scale=0.3)
    leaves = [x.double().requires_grad_() for x in tensors]
    expected = attention_reference(*leaves, mask=Mask(), scale=0.3)
    for got, want in zip((out, *grads), (expected, *torch.autograd.grad(expected, leaves, grad.double()))):
        torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)


def test_selective_recomputation_sees_one_operator():
    """The scores inside are no products that it would keep."""
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    *tensors, _ = draw(2, 2, 4, 4)
    with Watch():
        attention_part_reference(*tensors, causal=True, scale=0.3)
    assert seen == ["llmtrain.attention_part.default"]
