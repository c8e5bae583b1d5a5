"""Which groups of sequences experts are balanced over."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtrain.config.ffn import BalanceConfig
from llmtrain.errors import UserError
from llmtrain.layout.balance import Groups


@settings(deadline=None)
@given(st.data())
def test_every_sample_is_in_the_group_of_its_number_on_every_mesh(data):
    rows, ranks, rounds = (data.draw(st.sampled_from((1, 2, 4)), label=name) for name in ("rows", "ranks", "rounds"))
    batch = rows * ranks * rounds
    size = data.draw(st.sampled_from([size for size in (1, 2, 4, 8, 16, 32, 64) if batch % size == 0]))
    groups = Groups.of_step(BalanceConfig(sequences=size), batch=batch, rows=rows, seq_len=5, ranks=ranks)
    window = groups.window
    assert groups.count == batch // size and groups.tokens == 5 * size and rounds % window == 0
    for first in range(0, rounds, window):
        members: dict[tuple, set[int]] = {}
        for rank in range(ranks):
            numbers, count = groups.numbered(window, rank)
            for at, row_groups in enumerate(numbers):
                assert len(row_groups) == rows and all(0 <= g < count for g in row_groups)
                start = ((first + at) * ranks + rank) * rows
                for row, group in enumerate(row_groups):
                    owner = "all" if groups.over_ranks else rank  # what is summed over ranks is numbered alike by all
                    members.setdefault((owner, group), set()).add(start + row)
        assert sorted(map(min, members.values())) == list(range(first * ranks * rows, (first + window) * ranks * rows, size))
        assert all(found == set(range(min(found), min(found) + size)) for found in members.values())


@pytest.mark.parametrize(
    ("size", "shape", "message"),
    [
        (3, {"batch": 8, "rows": 1, "ranks": 1}, "sequences 3 does not divide the 8 sequences of a step"),
        (3, {"batch": 12, "rows": 2, "ranks": 1}, "sequences 3 and train.micro_batch 2: one must divide the other"),
        (
            6,
            {"batch": 12, "rows": 1, "ranks": 4},
            r"sequences 6 and the 4 sequences that are computed at once \(micro_batch 1 x 4 data ranks\)",
        ),
    ],
)
def test_groups_that_do_not_fit_are_refused_with_the_arithmetic(size, shape, message):
    with pytest.raises(UserError, match=message):
        Groups.of_step(BalanceConfig(sequences=size), seq_len=4, **shape)


def test_step_is_the_whole_batch_and_nothing_a_row():
    assert Groups.of_step(BalanceConfig(), batch=8, rows=2, seq_len=4, ranks=2).size == 8
    assert Groups.of_step(None, batch=8, rows=2, seq_len=4, ranks=2).size == 1
