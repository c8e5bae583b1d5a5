"""The executable reference of FastAttention against the formula, and what it counts."""

from functools import partial

import pytest
import torch
from attention_call import AttentionCall
from attention_calls import Matrix, calls
from attention_harness import check, check_mask
from held_memory import Held
from hypothesis import given, settings
from hypothesis import strategies as st
from llmtrain_kernels import Mask, Schedule, Tiling
from llmtrain_kernels.tiling import MIXED
from llmtrain_kernels.tiling_attention import attention
from llmtrain_kernels.tiling_counts import Counts
from llmtrain_kernels.tiling_mask import template

MATRIX = Matrix(tile=16, longest=70)
TILINGS = [Tiling((32, 32), (16, 16), 8), Tiling((16, 48), (16, 8), 5), Tiling((8, 8), (8, 8), 8)]


@settings(max_examples=60, deadline=None)
@given(call=calls(MATRIX), tiling=st.sampled_from(TILINGS))
def test_values_and_gradients_are_the_formulas(call, tiling):
    tiled = partial(attention, tiling=tiling)
    check(tiled, call, dtype=torch.float64)
    check_mask(tiled, call)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@settings(max_examples=25, deadline=None)
@given(call=calls(MATRIX), tiling=st.sampled_from(TILINGS))
def test_narrow_dtypes_stay_within_their_bounds(dtype, call, tiling):
    check(partial(attention, tiling=tiling), call, dtype=dtype)


def test_the_default_tiles_and_long_rows():
    mask = Mask(documents=((100, 300, 500), (899, 1)), window=280)
    call = AttentionCall(mask, rows=2, heads=2, queries=600, keys=900, d=32, dv=16, q_offset=300, lse=True)
    check(attention, call, dtype=torch.float64)


CAUSAL = Mask()
SHIFTS = AttentionCall(Mask(window=9), queries=24, keys=20, d=8, dv=8, q_offset=7, kv_offset=2)


def used_bits(call, tiling):
    """Bits of the template that some strip of the call looks at."""
    looked_at = torch.zeros(2 * tiling.edge, 2 * tiling.edge, dtype=torch.bool)
    schedule = Schedule(call.mask, queries=call.queries, keys=call.keys, q_offset=call.q_offset, kv_offset=call.kv_offset)
    for tile in schedule.tiles((tiling.strip, tiling.small[1])):
        for piece in tile.pieces:
            for corner in (piece.diagonal, piece.window):
                if tile.kind == MIXED and corner is not None:
                    row, column = corner
                    looked_at[row : row + len(piece.rows), column : column + len(piece.columns)] = True
    return looked_at.nonzero().tolist()


def test_every_wrong_bit_of_the_template_is_found(monkeypatch):
    tiling = Tiling((4, 4), (4, 4), 4)
    bits = used_bits(SHIFTS, tiling)
    assert len(bits) > 20
    for bit in bits:
        wrong = template(tiling.edge)
        wrong[tuple(bit)] ^= True
        monkeypatch.setattr("llmtrain_kernels.tiling_mask.template", lambda edge, wrong=wrong, **_: wrong)
        with pytest.raises(AssertionError):
            check_mask(partial(attention, tiling=tiling), SHIFTS, dtype=torch.float16)
        with pytest.raises(AssertionError):
            check(partial(attention, tiling=tiling), SHIFTS, dtype=torch.float64)
    monkeypatch.undo()
    check_mask(partial(attention, tiling=tiling), SHIFTS, dtype=torch.float16)


def counted(tiling, mask=CAUSAL, length=512, heads=2, backward=False):
    counts = Counts()
    q, k, v = (torch.randn(1, n, length, 16, requires_grad=backward) for n in (heads, 1, 1))
    out = attention(q, k, v, mask=mask, tiling=tiling, counts=counts)
    if backward:
        out.sum().backward()
    return counts


def test_large_tiles_need_fewer_hand_overs_for_the_same_small_tiles():
    two, one = counted(Tiling((128, 128), (32, 32), 32)), counted(Tiling((32, 32), (32, 32), 32))
    assert two.small_visited == one.small_visited == 2 * 16 * 17 // 2 and two.small_skipped == one.small_skipped
    assert two.small_masked == one.small_masked == 2 * 16
    assert one.hand_overs == one.small_visited and two.hand_overs == 2 * 4 * 5 // 2
    assert two.moved["memory > L1"] < one.moved["memory > L1"] / 2


def test_what_is_hidden_is_neither_loaded_nor_computed():
    tiling = Tiling((64, 64), (32, 32), 32)
    full, causal, window = (counted(tiling, mask, backward=True) for mask in (Mask(causal=False), Mask(), Mask(window=64)))
    assert full.small_masked == full.small_skipped == full.large_skipped == full.moved["mask > UB"] == 0
    for counts in (full, causal, window):
        assert counts.large_visited + counts.large_skipped == 2 * 2 * 8 * 8  # heads, passes, tiles
        assert counts.small_visited + counts.small_skipped == 2 * 2 * 16 * 16
    for way in ("memory > L1", "L1 > L0", "L0 > memory", "memory > UB", "UB > memory"):
        assert full.moved[way] > causal.moved[way] > window.moved[way]


def measured(length):
    """Bytes held at the peak of a forward and backward pass, without inputs, and the largest single result."""
    q, k, v = (torch.randn(1, 1, length, 16, requires_grad=True) for _ in range(3))
    grad = torch.randn(1, 1, length, 16)
    with Held() as held:
        torch.autograd.grad(attention(q, k, v, mask=Mask()), (q, k, v), grad)
    return held.peak, held.largest


def test_memory_grows_with_the_length_and_not_with_its_square():
    (short, _), (middle, _), (long, largest) = (measured(length) for length in (512, 1024, 2048))
    assert long - middle == pytest.approx(2 * (middle - short), rel=0.02)
    assert largest == 256 * 256 * 4 < 2048 * 2048  # a large tile; a mask of all pairs would be 4 MiB in bytes


def test_the_measure_sees_an_attention_that_holds_all_scores():
    q = torch.randn(1, 1, 512, 16)
    with Held() as held:
        (q @ q.mT).softmax(-1) @ q
    assert held.largest == 512 * 512 * 4 and held.peak >= 2 * held.largest


def test_a_second_derivative_is_refused():
    q = torch.randn(1, 1, 8, 4, requires_grad=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(attention(q, q, q, mask=Mask()).sum(), q, create_graph=True)


def test_what_does_not_fit_is_refused():
    q = torch.randn(1, 3, 8, 4)
    with pytest.raises(ValueError, match="H a multiple of K"):
        attention(q, q[:, :2], q[:, :2], mask=Mask())
    with pytest.raises(ValueError, match="sums to 9"):
        attention(q, q, q, mask=Mask(documents=((5, 4),)))
    with pytest.raises(ValueError, match="q_offset=-1"):
        attention(q, q, q, mask=Mask(), q_offset=-1)
