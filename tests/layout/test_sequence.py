"""Who holds which tokens of a row under context parallelism, and what each rank computes."""

from itertools import accumulate
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtrain.layout.sequence import partition

TOY = (16, 8, 24, 40)


def document_places(lengths):
    """Place in its document of every position of a row."""
    return [place for length in lengths for place in range(length)]


@st.composite
def rows(draw):
    """Rows of one length, each cut in documents of its own."""
    total = draw(st.integers(2, 60))
    cuts = [sorted(draw(st.sets(st.integers(1, total - 1), max_size=total // 2))) for _ in range(draw(st.integers(1, 3)))]
    return tuple(tuple(b - a for a, b in zip([0, *cut], [*cut, total])) for cut in cuts)


def test_the_papers_toy_case_costs_the_same_on_every_rank():
    parted = partition((TOY,), 4)
    assert [parted.score_entries(rank) for rank in range(4)] == [323] * 4
    assert parted.local_length == sum(TOY) // 4 and parted.padding_share == 0


def test_cutting_the_whole_row_does_not():
    assert whole_row_cut(TOY, 4).tolist() == [451, 355, 203, 283]


def test_lengths_that_divide_are_cut_by_the_papers_rule():
    parted = partition((TOY,), 4)
    for rank in range(4):
        expected = []
        for start, length in zip(accumulate(TOY, initial=0), TOY):
            end, size = start + length, length // 8
            expected += [*range(start + rank * size, start + (rank + 1) * size), *range(end - (rank + 1) * size, end - rank * size)]
        assert parted.sources[rank, 0].tolist() == expected


@settings(max_examples=150, deadline=None)
@given(documents=rows(), cp=st.integers(1, 8), multiple=st.sampled_from([1, 2, 4]))
def test_every_position_is_held_once_in_rows_of_equal_length(documents, cp, multiple):
    parted, total = partition(documents, cp, multiple), sum(documents[0])
    shortest = -(-total // cp)
    assert parted.local_length == -(-shortest // multiple) * multiple
    assert parted.sources.shape == (cp, len(documents), parted.local_length)
    for row in range(len(documents)):
        held = parted.sources[:, row]
        assert sorted(held[held >= 0].tolist()) == list(range(total))
        assert np.array_equal(held.reshape(-1)[parted.places[row]], np.arange(total))
        counts = (held >= 0).sum(1)
        assert counts.max() - counts.min() <= 1
        assert all(sorted(rank[rank >= 0].tolist()) == rank[: (rank >= 0).sum()].tolist() for rank in held), "in order, padding last"
    assert parted.padding_share == pytest.approx((parted.sources < 0).mean())


@settings(max_examples=100, deadline=None)
@given(documents=rows(), cp=st.integers(1, 8))
def test_pieces_cover_the_mask_and_their_cost_is_counted(documents, cp):
    parted, total = partition(documents, cp), sum(documents[0])
    for rank in range(cp):
        counts = np.zeros((len(documents), total, total), dtype=int)
        for source in range(cp):
            for piece in parted.pieces(rank, source):
                assert piece.causal == (source == rank)
                for row in range(len(documents))[piece.rows]:
                    queries, keys = parted.sources[rank, row, piece.queries], parted.sources[source, row, piece.keys]
                    seen = np.tri(len(queries), dtype=int) if piece.causal else np.ones((len(queries), len(keys)), dtype=int)
                    counts[row][np.ix_(queries, keys)] += seen
        assert counts.sum() == parted.score_entries(rank)
        for row, lengths in enumerate(documents):
            index = np.repeat(np.arange(len(lengths)), lengths)
            mask = np.tri(total, dtype=int) * (index[:, None] == index)
            mine = parted.sources[rank, row][parted.sources[rank, row] >= 0]
            expected = np.zeros_like(mask)
            expected[mine] = mask[mine]
            assert np.array_equal(counts[row], expected)


def exponential_row(mean, seed):
    rng, lengths, left = np.random.default_rng(seed), [], 8192
    while left:
        lengths.append(min(left, 1 + int(rng.exponential(mean))))
        left -= lengths[-1]
    return tuple(lengths)


def whole_row_cut(lengths, cp):
    """Scores per rank where the row is cut in 2 x cp chunks without regard to its documents."""
    chunks = (np.array(document_places(lengths)) + 1).reshape(2 * cp, -1).sum(1)
    return (chunks + chunks[::-1])[:cp]


def test_the_documented_balance_is_what_the_code_gives():
    page = (Path(__file__).parents[2] / "docs" / "context-parallel.md").read_text()
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line.endswith("% |")]
    assert len(lines) == 6
    for mean, cp, *cells in lines:
        mean, cp = int(mean), int(cp)
        rows = [exponential_row(mean, seed) for seed in range(20)]
        ours = [[partition((row,), cp).score_entries(rank) for rank in range(cp)] for row in rows]
        padded = [sum(-(-length // (2 * cp)) * 2 * cp for length in row) / sum(row) - 1 for row in rows]
        plain = [whole_row_cut(row, cp) for row in rows]
        uneven = [np.mean([max(work) / np.mean(work) for work in found]) for found in (ours, plain)]
        assert cells == [f"{uneven[0]:.3f}", f"{uneven[1]:.2f}", f"{np.mean(padded):.1%}"]
        assert all(partition((row,), cp).padding_share == 0 for row in rows)


def test_documents_of_one_token_are_dealt_out():
    parted = partition(((1,) * 16,), 4)
    assert [parted.score_entries(rank) for rank in range(4)] == [4] * 4 and parted.padding_share == 0


def test_a_row_that_cp_does_not_divide_is_padded_by_less_than_cp():
    parted = partition(((5, 8),), 4)
    assert parted.local_length == 4 and parted.padding_share == pytest.approx(3 / 16)


def test_ranks_without_a_token_hold_padding():
    parted = partition(((2, 1),), 4)
    assert parted.local_length == 1 and sorted(parted.sources.ravel().tolist()) == [-1, 0, 1, 2]


def test_the_same_documents_are_parted_once():
    documents = ((7, 13, 11), (31,))
    before = partition.cache_info().misses
    assert partition(documents, 3, 2) is partition(documents, 3, 2)
    assert partition.cache_info().misses == before + 1


@pytest.mark.parametrize(
    ("documents", "cp", "message"),
    [(((8,), (9,)), 2, r"\[8, 9\] tokens"), (((8, 0),), 2, "1 or more")],
)
def test_what_cannot_be_parted_is_refused(documents, cp, message):
    with pytest.raises(ValueError, match=message):
        partition(documents, cp)
