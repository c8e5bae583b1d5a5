"""Grouped products and the sorting of rows by expert."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from llmtrain.ops import implementations
from llmtrain.ops.experts import permute_reference, unpermute_reference

ON_CPU = [entry for entry in implementations("grouped_mm") if "cpu" in entry.devices]
GROUPED = [
    pytest.param(
        entry.function,
        torch.float64 in entry.dtypes,
        id=entry.name,
        marks=pytest.mark.skipif(entry.probe() is not None, reason=str(entry.probe())),
    )
    for entry in ON_CPU
]


@pytest.mark.parametrize(("grouped_mm", "fp64"), GROUPED)
@settings(max_examples=25, deadline=None)
@given(counts=st.lists(st.integers(0, 5), min_size=1, max_size=5).filter(sum))
def test_grouped_mm_is_one_product_per_row(grouped_mm, fp64, counts):
    dtype = torch.float64 if fp64 else torch.float32
    # Widths are multiples of 16 bytes, which the fused kernel asks for.
    x = torch.randn(sum(counts), 8, dtype=dtype, requires_grad=True)
    weight = torch.randn(len(counts), 8, 4, dtype=dtype, requires_grad=True)
    out = grouped_mm(x, weight, torch.tensor(counts))
    experts = [e for e, count in enumerate(counts) for _ in range(count)]
    expected = torch.stack([row @ weight[e] for row, e in zip(x, experts)])
    torch.testing.assert_close(out, expected)
    for grad in (torch.randn_like(out), torch.ones(()).to(dtype).expand_as(out)):
        got = torch.autograd.grad(out, (x, weight), grad, retain_graph=True)
        want = torch.autograd.grad(expected, (x, weight), grad, retain_graph=True)
        for g, w in zip(got, want):
            torch.testing.assert_close(g, w)


@pytest.mark.parametrize("name", ["loop", "padded"])
def test_wrong_counts_are_refused(name):
    grouped_mm = next(entry.function for entry in implementations("grouped_mm") if entry.name == name)
    with pytest.raises(ValueError, match=r"sum N"):
        grouped_mm(torch.randn(4, 8), torch.randn(2, 8, 4), torch.tensor([1, 2]))


@pytest.mark.parametrize("name", ["loop", "padded"])
def test_no_rows_at_all(name):
    grouped_mm = next(entry.function for entry in implementations("grouped_mm") if entry.name == name)
    assert grouped_mm(torch.randn(0, 8), torch.randn(2, 8, 4), torch.tensor([0, 0])).shape == (0, 4)


def test_permute_sorts_by_expert_then_token_and_unpermute_weighs():
    ids = torch.tensor([[2, 0], [0, 1], [2, 1]])
    x = torch.arange(3.0)[:, None] + 1
    rows, order, counts = permute_reference(x, ids, 4)
    assert rows[:, 0].tolist() == [1, 2, 2, 3, 1, 3] and counts.tolist() == [2, 2, 2, 0]
    assert order.tolist() == [1, 2, 3, 5, 0, 4]
    probs = torch.tensor([[0.5, 0.25], [1.0, 2.0], [0.0, 1.0]])
    scaled = rows * torch.tensor([10.0, 10, 100, 100, 1000, 1000])[:, None]  # each expert multiplies by a number of its own
    expected = [0.5 * 1000 + 0.25 * 10, 2 * (10 + 2 * 100), 3 * 100]
    assert unpermute_reference(scaled, order, probs)[:, 0].tolist() == expected


def test_gradients_of_permute_and_unpermute():
    ids = torch.tensor([[2, 0], [0, 1], [2, 1]])
    x, probs = torch.randn(3, 4, dtype=torch.float64, requires_grad=True), torch.rand(3, 2, dtype=torch.float64, requires_grad=True)

    def there_and_back(x, probs):
        rows, order, _ = permute_reference(x, ids, 3)
        return unpermute_reference(rows**2, order, probs)

    assert gradcheck(there_and_back, (x, probs))


def test_unpermute_adds_up_in_the_wider_dtype():
    rows, order, _ = permute_reference(torch.full((1, 1), 256.0).bfloat16(), torch.tensor([[0, 1, 2]]), 3)
    out = unpermute_reference(rows, order, torch.tensor([[1.0, 1 / 256, 1 / 256]]))
    assert out.dtype == torch.bfloat16 and out.item() == 258.0
