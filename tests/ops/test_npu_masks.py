"""What masks become for npu_fusion_attention: the modes as its documentation defines them, against which keys each query must see."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtrain.ops import Mask
from llmtrain.ops.npu import attention
from llmtrain.ops.npu.masks import BAND, CAUSAL, FULL, SIDE, sparse, triangle


def seen_by(kind, queries, keys):
    """The documented meaning: distances from the diagonal through the last query and key; 2147483647 is no limit."""
    shift = keys - queries
    if kind == FULL:
        return [[True] * keys for _ in range(queries)]
    behind, ahead = (10**9, 0) if kind == CAUSAL else (kind.behind, kind.ahead)
    return [[i + shift - behind <= j <= i + shift + ahead for j in range(keys)] for i in range(queries)]


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 7), st.integers(1, 9), st.integers(-4, 8), st.one_of(st.none(), st.integers(1, 9)), st.booleans())
def test_every_mode_shows_each_query_its_keys(queries, keys, shift, window, causal):
    mask = Mask(causal=causal, window=window if causal else None)
    want = [
        [not causal or (j <= i + shift and (mask.window is None or j > i + shift - mask.window)) for j in range(keys)]
        for i in range(queries)
    ]
    kind = sparse(mask, queries=queries, keys=keys, shift=shift)
    if kind is None:
        assert not all(any(row) for row in want)
    else:
        assert seen_by(kind, queries, keys) == want


def test_plain_cases_take_the_cheap_modes():
    assert sparse(Mask(), queries=8, keys=8, shift=0) == CAUSAL
    assert sparse(Mask(), queries=2, keys=8, shift=6) == CAUSAL
    assert sparse(Mask(), queries=1, keys=8, shift=7) == FULL
    assert sparse(Mask(causal=False), queries=3, keys=5, shift=0) == FULL
    assert sparse(Mask(window=8), queries=8, keys=8, shift=0) == CAUSAL
    assert sparse(Mask(window=7), queries=8, keys=8, shift=0).mode == BAND


def test_every_mode_but_full_brings_the_triangle():
    for kind in (CAUSAL, sparse(Mask(window=3), queries=8, keys=8, shift=0)):
        mask = kind.arguments(torch.device("cpu"))["atten_mask"]
        assert mask.shape == (SIDE, SIDE) and mask.dtype == torch.bool
        assert not mask[5, 5] and mask[5, 6] and not mask[6, 5]
    assert FULL.arguments(torch.device("cpu")) == {"sparse_mode": 0}
    assert triangle(torch.device("cpu")) is triangle(torch.device("cpu"))


def test_a_triangle_made_in_inference_mode_can_be_saved_for_backward():
    triangle.cache_clear()
    with torch.inference_mode():
        made = triangle(torch.device("cpu"))
    assert not made.is_inference()


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=40), most=st.integers(1, 8), tokens=st.integers(9, 40))
def test_documents_are_cut_into_calls_by_number_and_tokens(lengths, most, tokens):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "MOST_DOCUMENTS", most)
        patch.setattr(attention, "MOST_TOKENS", tokens)
        runs = list(attention._runs(lengths))
    found = [b - a for run in runs for a, b in zip([0, *run.ends], run.ends)]
    assert found == lengths and runs[0].first == 0 and all(a.last == b.first for a, b in pairwise(runs))
    assert all(len(run.ends) <= most and run.ends[-1] == run.last - run.first <= tokens and run.longest <= run.ends[-1] for run in runs)
