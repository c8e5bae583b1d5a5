"""Attention, projection and sum in tiles: the same numbers as one after the other, and each tile is sent before the next is computed."""

import pytest
import torch
from llmtrain_kernels import Mask
from llmtrain_kernels.tiled_reduce import attention_project_reduce, project_reduce, tiles
from worlds import run_world

CASES = {
    "causal": {"batch": 1, "queries": 23, "keys": 23},
    "rows": {"batch": 5, "queries": 9, "keys": 9},
    "after a cache": {"batch": 2, "queries": 11, "keys": 18, "q_offset": 7},
    "a part of the keys": {"batch": 1, "queries": 12, "keys": 12, "q_offset": 2, "kv_offset": 5},
    "full": {"batch": 1, "queries": 12, "keys": 20, "mask": {"causal": False}},
    "window": {"batch": 2, "queries": 21, "keys": 21, "mask": {"window": 4}},
    "documents": {"batch": 2, "queries": 16, "keys": 16, "mask": {"documents": ((5, 1, 10), (16,))}},
    "rows of documents": {"batch": 4, "queries": 8, "keys": 8, "mask": {"documents": ((5, 3), (8,), (1, 7), (8,))}},
    "full documents": {"batch": 1, "queries": 16, "keys": 16, "mask": {"documents": ((5, 1, 10),), "causal": False}},
}
COUNTS = [1, 2, 3, 4, 40]
BOUND = 2e-15
"""Float64: products of fewer rows are rounded in another order, and ranks add in one of their own."""


def test_two_ranks_agree_with_one(tmp_path):
    args = {"cases": CASES, "names": ["reference", "sdpa", "tiled"], "counts": COUNTS}
    found = run_world("tiled_reduce_world:compare", 2, args=args, folder=tmp_path)
    assert len(found) == len(CASES) * 3 * len(COUNTS)
    assert not {case: error for case, error in found.items() if not error < BOUND}


@pytest.mark.parametrize("batch, length, count", [(1, 10, 3), (3, 7, 3), (7, 5, 3), (3, 10, 4), (2, 1, 8), (1, 1, 1), (2, 16, 4)])
def test_tiles_are_pieces_of_memory_without_gaps(batch, length, count):
    whole, seen = torch.zeros(batch, length, 2), torch.zeros(batch, length)
    made = tiles(batch, length, count)
    for tile in made:
        assert whole[tile].is_contiguous() and whole[tile].numel()
        seen[tile] += 1
    assert (seen == 1).all()
    assert len(made) == min(batch * length, count) or (count > batch and len(made) == batch * min(length, -(-count // batch)))


class Late:
    """Sums that are made when somebody waits for them, and a log of what happens."""

    def __init__(self):
        self.log: list[str] = []

    def reduce(self, part):
        number = sum(entry.startswith("send") for entry in self.log)
        self.log.append(f"send {number}")
        outer, kept = self, part.clone()
        part.fill_(float("nan"))

        class Handle:
            def wait(self):
                outer.log.append(f"wait {number}")
                part.copy_(3 * kept)

        return Handle()


@torch.no_grad()
def test_a_tile_is_sent_before_the_next_is_computed_and_all_are_waited_for():
    late, x, weight = Late(), torch.randn(1, 12, 5), torch.randn(7, 5)

    def inputs(tile):
        late.log.append(f"compute {tile.positions.start}")
        return x[tile]

    out = project_reduce(inputs, weight, tiles=tiles(1, 12, 3), shape=(1, 12), reduce=late.reduce)
    turns = [f"{what} {number}" for i in range(3) for what, number in (("compute", 4 * i), ("send", i))]
    assert late.log == [*turns, "wait 0", "wait 1", "wait 2"]
    torch.testing.assert_close(out, 3 * x @ weight.t())


@torch.no_grad()
def test_a_tile_of_a_causal_call_gets_the_keys_that_it_sees():
    q, k, calls = torch.randn(1, 2, 8, 4), torch.randn(1, 1, 11, 4), []

    def attention(q, k, v, *, mask, scale, q_offset, kv_offset):
        calls.append((q.shape[2], k.shape[2], q_offset))
        return torch.zeros_like(q)

    for causal in (True, False):
        given = {"attention": attention, "reduce": Late().reduce, "count": 2, "mask": Mask(causal=causal), "q_offset": 3}
        attention_project_reduce(q, k, k, torch.randn(5, 8), **given)
    assert calls == [(4, 7, 3), (4, 11, 7), (4, 11, 3), (4, 11, 7)]


def test_gradients_are_refused():
    weight = torch.zeros(3, 5, requires_grad=True)
    with pytest.raises(ValueError, match="no backward pass"):
        project_reduce(lambda tile: torch.zeros(1, 5), weight, tiles=tiles(1, 1, 1), shape=(1, 1), reduce=Late().reduce)
