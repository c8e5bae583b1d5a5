"""Attention implementations against the formula, written here element by element."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmtrain.ops import Mask, sdpa, tiled_attention
from llmtrain.ops.attention import attention_reference
from llmtrain.ops.sdpa import attention_sdpa
from llmtrain.ops.tiled_attention import attention_tiled

IMPLEMENTATIONS = [attention_reference, attention_sdpa, attention_tiled]


@pytest.fixture(autouse=True)
def blocks_of_three(monkeypatch):
    """So that a few tokens make several blocks."""
    monkeypatch.setattr(sdpa, "BLOCK", 3)
    monkeypatch.setattr(tiled_attention, "BLOCK", 3)


def sees(mask, row, query, key):
    """The definition, one pair of positions at a time."""
    if mask.causal and key > query:
        return False
    if mask.window is not None and query - key >= mask.window:
        return False
    if mask.documents is None:
        return True
    document = [index for index, length in enumerate(mask.documents[row]) for _ in range(length)]
    return document[query] == document[key]


def formula(q, k, v, mask, *, scale=None, q_offset=0, kv_offset=0):
    """Output and log-sum-exp of softmax attention, query by query, without any masked score."""
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    group = q.shape[1] // k.shape[1]
    outs, lses = [], []
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for i in range(q.shape[2]):
                seen = [j for j in range(k.shape[2]) if sees(mask, b, q_offset + i, kv_offset + j)]
                scores = scale * (k[b, h // group, seen] @ q[b, h, i])
                lses.append(torch.logsumexp(scores, 0) if seen else q.new_tensor(float("-inf")))
                outs.append(torch.softmax(scores, 0) @ v[b, h // group, seen])
    return torch.stack(outs).view(*q.shape[:3], -1), torch.stack(lses).view(q.shape[:3])


@st.composite
def lengths(draw, total):
    cuts = sorted(draw(st.sets(st.integers(1, total - 1), max_size=3))) if total > 1 else []
    return tuple(b - a for a, b in zip([0, *cuts], [*cuts, total]))


@st.composite
def calls(draw):
    rows, kv_heads = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    heads = kv_heads * draw(st.integers(1, 2))
    queries, keys = draw(st.integers(1, 7)), draw(st.integers(1, 7))
    q_offset, kv_offset = draw(st.sampled_from([(0, 0), (max(0, keys - queries), 0), (3, 1), (1, 5), (12, 0)]))
    end = max(q_offset + queries, kv_offset + keys)
    causal = draw(st.booleans())
    layouts = draw(st.none() | st.lists(lengths(end), min_size=1, max_size=rows))
    documents = None if layouts is None else tuple(layouts[row % len(layouts)] for row in range(rows))
    mask = Mask(causal=causal, documents=documents, window=draw(st.none() | st.integers(1, 5)) if causal else None)
    d, dv = draw(st.sampled_from([(4, 4), (4, 2), (2, 4)]))
    return mask, (rows, heads, kv_heads, queries, keys, d, dv), {"q_offset": q_offset, "kv_offset": kv_offset}


@st.composite
def training_calls(draw):
    """Causal, as many keys as queries, no offset."""
    rows, kv_heads, length = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 11))
    heads = kv_heads * draw(st.integers(1, 3))
    documents = draw(st.none() | st.tuples(*[lengths(length)] * rows))
    d, dv = draw(st.sampled_from([(4, 4), (4, 2), (2, 4)]))
    window = draw(st.none() | st.integers(1, 12))
    return Mask(documents=documents, window=window), (rows, heads, kv_heads, length, length, d, dv), {}


def inputs(shape, dtype=torch.float64):
    rows, heads, kv_heads, queries, keys, d, dv = shape
    sizes = ((heads, queries, d), (kv_heads, keys, d), (kv_heads, keys, dv))
    return [torch.randn(rows, *size, dtype=dtype, requires_grad=True) for size in sizes]


def gradients(out, tensors, grad):
    if not out.requires_grad:  # no query sees any key
        return [torch.zeros_like(x) for x in tensors]
    found = torch.autograd.grad(out, tensors, grad, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(tensors, found)]


@pytest.mark.parametrize("attention", IMPLEMENTATIONS)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(call=calls() | training_calls(), seed=st.integers(0, 99))
def test_output_and_gradients_are_the_formulas(attention, call, seed):
    mask, shape, offsets = call
    torch.manual_seed(seed)
    tensors = inputs(shape)
    out = attention(*tensors, mask=mask, **offsets)
    expected, _ = formula(*tensors, mask, **offsets)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)
    grad = torch.randn_like(out)
    for got, want in zip(gradients(out, tensors, grad), gradients(expected, tensors, grad)):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


@settings(max_examples=30, deadline=None)
@given(call=calls())
def test_the_references_lse_and_its_gradient(call):
    mask, shape, offsets = call
    tensors = inputs(shape)
    _, lse = attention_reference(*tensors, mask=mask, scale=0.3, return_lse=True, **offsets)
    _, expected = formula(*tensors, mask, scale=0.3, **offsets)
    torch.testing.assert_close(lse, expected)
    finite = expected.isfinite()
    got, want = (gradients(x[finite].sum(), tensors[:2], None) for x in (lse, expected))
    for g, w in zip(got, want):
        torch.testing.assert_close(g, w)


def test_pieces_of_the_keys_merge_through_lse():
    q, k, v = inputs((1, 2, 1, 6, 6, 4, 4))
    mask = Mask(documents=((2, 4),))
    parts = [attention_reference(q, k[:, :, a:b], v[:, :, a:b], mask=mask, kv_offset=a, return_lse=True) for a, b in ((0, 3), (3, 6))]
    total = torch.logaddexp(parts[0][1], parts[1][1])
    merged = sum(out * torch.exp(lse - total).unsqueeze(-1) for out, lse in parts)
    torch.testing.assert_close(merged, attention_reference(q, k, v, mask=mask))


@pytest.mark.parametrize("attention", IMPLEMENTATIONS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
def test_narrow_dtypes(attention, dtype, tolerance):
    torch.manual_seed(0)
    wide = inputs((2, 4, 2, 33, 33, 16, 16))
    narrow = [x.detach().to(dtype) for x in wide]
    mask = Mask(documents=((20, 13), (33,)))
    out = attention(*narrow, mask=mask)
    assert out.dtype == dtype
    expected, _ = formula(*[x.double() for x in narrow], mask)
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("wrong", [Mask(causal=False), Mask(window=3), Mask(documents=((4, 4),)), Mask(documents=((5, 3),), window=2)])
@pytest.mark.parametrize("attention", IMPLEMENTATIONS)
def test_another_mask_gives_another_output(attention, wrong):
    torch.manual_seed(0)
    tensors = inputs((1, 1, 1, 8, 8, 4, 4))
    expected, _ = formula(*tensors, Mask(documents=((5, 3),)))
    assert not torch.allclose(attention(*tensors, mask=wrong), expected, atol=1e-3)


@pytest.mark.parametrize("attention", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("mask", "offsets", "message"),
    [
        (Mask(documents=((5, 4),)), {}, r"documents\[0\]=\(5, 4\) sums to 9; .* sum to 8"),
        (Mask(documents=((8,), (8,))), {}, "describes 2 batch rows, the call has 1"),
        (Mask(documents=((8, 0),)), {}, "at least 1"),
        (Mask(causal=False, window=2), {}, "needs causal=True"),
        (Mask(), {"q_offset": -1}, "q_offset=-1"),
    ],
)
def test_what_does_not_fit_is_refused(attention, mask, offsets, message):
    tensors = inputs((1, 2, 1, 8, 8, 4, 4))
    with pytest.raises(ValueError, match=message):
        attention(*tensors, mask=mask, **offsets)


@pytest.mark.parametrize("attention", [attention_sdpa, attention_tiled])
def test_wrong_shapes_and_a_wanted_lse_are_refused(attention):
    q, k, v = inputs((1, 3, 2, 8, 8, 4, 4))
    with pytest.raises(ValueError, match="H a multiple of K"):
        attention(q, k, v, mask=Mask())
    with pytest.raises(ValueError, match=r"kernels\.attention"):
        attention(q, k, v, mask=Mask(), return_lse=True)


def test_a_second_derivative_is_refused_not_wrong():
    q, k, v = inputs((1, 1, 1, 8, 8, 4, 4))
    with pytest.raises(RuntimeError, match=r"no second derivative; use kernels\.attention: reference"):
        torch.autograd.grad(attention_tiled(q, k, v, mask=Mask()).sum(), q, create_graph=True)


def test_long_documents_are_left_to_the_flash_kernel(monkeypatch):
    handed_over = []
    monkeypatch.setitem(tiled_attention.LONGEST, 8, 8)  # float64 has 8 bytes
    monkeypatch.setattr(tiled_attention, "attention_sdpa", lambda *args, **options: handed_over.append(options["mask"]))
    tensors = inputs((1, 1, 1, 12, 12, 4, 4))
    masks = [Mask(documents=((8, 4),)), Mask(documents=((9, 3),)), Mask()]
    for mask in masks:
        attention_tiled(*tensors, mask=mask)
    assert handed_over == masks[1:]


@pytest.mark.parametrize("mask", [Mask(documents=((512, 512),)), Mask(window=64), Mask()])
def test_sdpa_holds_no_square_tensor(mask, monkeypatch):
    """Every tensor made by the forward pass stays below S x S elements, and documents and causal calls make no mask at all."""
    from torch.utils._python_dispatch import TorchDispatchMode

    monkeypatch.setattr(sdpa, "BLOCK", 256)
    sizes, masks = [], []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            masks.extend([1] for x in (kwargs or {}).values() if isinstance(x, torch.Tensor))
            sizes.extend(x.numel() for x in (out if isinstance(out, tuple) else (out,)) if isinstance(x, torch.Tensor))
            return out

    tensors = [x.detach() for x in inputs((1, 1, 1, 1024, 1024, 8, 8), torch.float32)]
    with Watch():
        attention_sdpa(*tensors, mask=mask)
    assert sizes and max(sizes) < 1024 * 1024 // 8
    assert bool(masks) == (mask.window is not None)


def test_layers_of_a_micro_batch_share_the_packed_lengths_of_the_npu_operator(monkeypatch):
    from llmtrain.ops.npu import attention as npu

    made, calls = [], []
    runs = npu._runs

    def operator(q, k, v, heads, layout, *, actual_seq_qlen, **_):
        calls.append(actual_seq_qlen)
        return q, *(q.new_ones(*q.shape[:2], 8) for _ in range(2))

    monkeypatch.setattr(npu, "_runs", lambda lengths: made.append(lengths) or runs(lengths))
    monkeypatch.setattr(npu.gateway, "fused", lambda name: operator)
    mask = Mask(documents=((2, 3), (5,)))
    q = torch.randn(2, 2, 5, 4)
    for _ in range(3):
        npu.attention_npu(q, q, q, mask=mask)
    assert made == [[2, 3, 5]] and calls == [[2, 5, 10]] * 3
