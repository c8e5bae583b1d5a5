"""Flash attention in Triton's interpreter on the CPU, against the formula in float64: numerics, mask bits, visits, torch.compile."""

import interpreted  # noqa: F401 - Triton serves here, or all of this is skipped
import pytest
import torch
from attention_call import AttentionCall
from attention_calls import HEAD_DIMS, Matrix, calls
from attention_formula import seen
from attention_harness import check, check_mask
from hypothesis import HealthCheck, given, settings
from llmtrain_kernels import Mask, triton_attention
from llmtrain_kernels.triton_attention import intervals, launch, tiles
from llmtrain_kernels.triton_attention.op import attention_op

attention = triton_attention.attention
QUERIES, KEYS = 16, 32
NARROW = Matrix(tile=16, longest=70, head_dims=((8, 8), (24, 16)), most_kv_heads=1, most_group=2)
DRAWN = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
DOCUMENTS = Mask(documents=((30, 20, 20),))


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """So that few tokens make several tiles, of unequal edges."""
    monkeypatch.setattr(tiles, "tile", lambda *_, **__: tiles.Tile(QUERIES, KEYS))


@DRAWN
@given(call=calls(NARROW))
def test_values_and_gradients_are_the_formulas(call):
    check(attention, call, dtype=torch.float32)


@DRAWN
@given(call=calls(Matrix(tile=16, longest=40, head_dims=((8, 40),), most_rows=1, most_kv_heads=1, most_group=1)))
def test_exactly_the_pairs_of_the_mask_take_part(call):
    check_mask(attention, call)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("d", "dv"), HEAD_DIMS)
def test_head_dims_and_dtypes(d, dv, dtype):
    call = AttentionCall(DOCUMENTS, heads=2, queries=70, keys=70, d=d, dv=dv, lse=True, strided=True)
    check(attention, call, dtype=dtype)


@pytest.mark.parametrize("side", ["first", "last", "q_first", "q_last"])
def test_one_wrong_bit_of_the_mask_is_found(side, monkeypatch):
    exact = intervals.intervals

    def wrong(*args):
        found = exact(*args)
        ends = getattr(found, side).clone()
        ends[0, 20] += 1
        return found._replace(**{side: ends})

    monkeypatch.setattr(launch, "intervals", wrong)
    call = AttentionCall(DOCUMENTS, queries=70, keys=70, d=8, dv=70)
    check_mask(attention, call, backward=False) if side[0] == "q" else None  # the other direction has its own ends
    with pytest.raises(AssertionError, match="1 pairs differ"):
        check_mask(attention, call)


PLACES = {
    "causal": AttentionCall(Mask(), queries=16, keys=160, q_offset=40),
    "window": AttentionCall(Mask(window=9), queries=16, keys=160, q_offset=80),
    "documents": AttentionCall(Mask(causal=False, documents=((70, 20, 70),)), queries=16, keys=160, q_offset=72),
    "before every key": AttentionCall(Mask(), queries=16, keys=160, kv_offset=40),
}


@pytest.mark.parametrize("name", PLACES)
def test_tiles_that_are_wholly_hidden_are_not_visited(name):
    """NaN in the keys and values of those tiles would spoil the sums, weight zero or not."""
    call = PLACES[name]
    hidden = ~seen(call.mask, rows=1, queries=call.query_range, keys=call.key_range)[0].any(0)
    hidden = hidden.unflatten(0, (-1, KEYS)).all(1).repeat_interleave(KEYS)
    assert hidden.any()
    q, k, v = (torch.randn(1, 1, n, 16) for n in (call.queries, call.keys, call.keys))
    k[:, :, hidden], v[:, :, hidden] = float("nan"), float("nan")
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    out = attention(q, k, v, **call.options())
    (grad_q,) = torch.autograd.grad(out.sum(), q)
    assert out.isfinite().all() and grad_q.isfinite().all()


def test_tiles_of_queries_that_are_wholly_hidden_are_not_visited():
    q, k, v = (torch.randn(1, 1, n, 16) for n in (160, 32, 32))
    q[:, :, :32], q[:, :, 80:] = float("nan"), float("nan")
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    out = attention(q, k, v, mask=Mask(window=17), kv_offset=32)
    grads = torch.autograd.grad(out[:, :, 32:80].sum(), (k, v))
    assert all(grad.isfinite().all() for grad in grads) and all((grad != 0).all() for grad in grads)


def test_pieces_of_the_keys_merge_through_lse_with_their_gradients():
    q, k, v = (torch.randn(1, 2, 40, 16, requires_grad=True) for _ in range(3))
    mask, grad = Mask(documents=((25, 15),)), torch.randn(1, 2, 40, 16)
    parts = [attention(q, k[:, :, a:b], v[:, :, a:b], mask=mask, kv_offset=a, return_lse=True) for a, b in ((0, 20), (20, 40))]
    total = torch.logaddexp(*(lse.clamp(min=-1e9) for _, lse in parts))
    merged = sum(out * torch.exp(lse.clamp(min=-1e9) - total).unsqueeze(-1) for out, lse in parts)
    whole = attention(q, k, v, mask=mask)
    torch.testing.assert_close(merged, whole)
    for got, want in zip(*(torch.autograd.grad(out, (q, k, v), grad) for out in (merged, whole))):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_launches_of_few_blocks_give_the_same(monkeypatch):
    call = AttentionCall(Mask(), heads=4, kv_heads=2, queries=70, keys=70, d=8, dv=8)
    monkeypatch.setitem(launch.MOST_BLOCKS, "cpu", 3)
    check(attention, call, dtype=torch.float32)


def test_it_is_an_operator_that_compiled_code_leaves_whole():
    q, k, v = (torch.randn(1, 2, 40, 16, requires_grad=True) for _ in range(3))
    mask = Mask(documents=((25, 15),), window=11)
    counts, lengths = intervals.documents(mask)
    torch.library.opcheck(attention_op, (q, k, v, counts, lengths, True, 11, 0.25, 0, 0))

    def block(q, k, v):
        out, lse = attention(q * 2, k, v, mask=mask, return_lse=True)
        return (out * 3).sum() + lse.sum()

    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    for got, want in zip(*(torch.autograd.grad(f(q, k, v), (q, k, v)) for f in (compiled, block))):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    ("tensors", "options", "message"),
    [
        ({"dtype": torch.float64}, {}, "float32, bfloat16, float16"),
        ({}, {"scale": -1.0}, "scale=-1.0; needed above 0"),
        ({"size": 257}, {}, "at most 256"),
        ({}, {"mask": Mask(documents=((3,),))}, "sums to 3"),
    ],
)
def test_what_it_does_not_serve_is_refused(tensors, options, message):
    q = torch.randn(1, 1, 4, tensors.get("size", 16), dtype=tensors.get("dtype", torch.float32))
    with pytest.raises(ValueError, match=message):
        attention(q, q, q, **{"mask": Mask()} | options)


def test_a_second_derivative_is_refused_not_wrong():
    q = torch.randn(1, 1, 8, 16, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"no second derivative; use kernels\.attention: reference"):
        torch.autograd.grad(attention(q, q, q, mask=Mask()).sum(), q, create_graph=True)
