"""Which tiles are computed and what is hidden in them, against the definition of a mask pair by pair."""

import pytest
import torch
from attention_calls import Matrix, calls
from attention_formula import seen
from hypothesis import given, settings
from hypothesis import strategies as st
from llmtrain_kernels import Mask, Schedule, Tiling
from llmtrain_kernels.tiling import ASCEND_910B, HIDDEN, MIXED, VISIBLE, view
from llmtrain_kernels.tiling_mask import TilingMask, mask_bytes, template

edges = st.integers(1, 9)


@settings(max_examples=2000, deadline=None)
@given(first_row=st.integers(0, 40), first_column=st.integers(0, 40), rows=edges, columns=edges)
def test_the_index_rule_gives_the_causal_mask_of_any_block(first_row, first_column, rows, columns):
    hidden = torch.arange(first_column, first_column + columns)[None] > torch.arange(first_row, first_row + rows)[:, None]
    found = view(first_row - first_column, rows, columns)
    assert (found == HIDDEN) == hidden.all().item() and (found == VISIBLE) == (not hidden.any().item())
    if isinstance(found, tuple):
        u, v = found
        edge = max(rows, columns)
        assert u >= 0 and u + rows <= 2 * edge and v >= 0 and v + columns <= 2 * edge
        assert torch.equal(template(edge)[u : u + rows, v : v + columns], hidden)


blocks = st.tuples(edges, edges)


@settings(max_examples=300, deadline=None)
@given(call=calls(Matrix(tile=4, longest=30)), block=blocks)
def test_tiles_hide_what_the_mask_hides_and_their_kind_is_exact(call, block):
    mask = TilingMask(max(block))
    want = seen(call.mask, rows=call.rows, queries=call.query_range, keys=call.key_range)
    for row in range(call.rows):
        got = torch.zeros(call.queries, call.keys, dtype=torch.bool)
        for tile in schedule(call, row).tiles(block):
            rows, columns = slice(tile.rows.start, tile.rows.stop), slice(tile.columns.start, tile.columns.stop)
            got[rows, columns] = ~mask.hidden(tile)
            part = want[row, rows, columns]
            assert tile.kind == (VISIBLE if part.all() else MIXED if part.any() else HIDDEN)
        assert torch.equal(got, want[row])


def schedule(call, row):
    offsets = {"q_offset": call.q_offset, "kv_offset": call.kv_offset}
    return Schedule(call.mask, queries=call.queries, keys=call.keys, batch_row=row, **offsets)


def test_a_tile_on_the_diagonal_is_a_view_of_the_template_and_not_a_copy():
    mask = TilingMask(64)
    tiles = [tile for tile in Schedule(Mask(), queries=256, keys=256).tiles((64, 32)) if tile.kind == MIXED]
    assert len(tiles) == 8
    assert all(mask.hidden(tile).untyped_storage().data_ptr() == mask.template.untyped_storage().data_ptr() for tile in tiles)


def test_a_causal_mask_skips_what_lies_above_the_diagonal():
    kinds = [tile.kind for tile in Schedule(Mask(), queries=1024, keys=1024).tiles((128, 128))]
    assert [kinds.count(kind) for kind in (HIDDEN, MIXED, VISIBLE)] == [28, 8, 28]


def test_a_window_visits_a_band():
    kinds = [tile.kind for tile in Schedule(Mask(window=256), queries=4096, keys=4096).tiles((128, 128))]
    assert kinds.count(VISIBLE) + kinds.count(MIXED) == 32 * 3 - 3 and kinds.count(VISIBLE) == 31


def test_a_mask_of_64k_costs_8_gib_dense_and_2_mib_tiled():
    assert mask_bytes(64 << 10, 512) == (8 << 30, 2 << 20)


@pytest.mark.parametrize(("d", "dv"), [(64, 64), (96, 96), (128, 128), (192, 128)])
def test_the_default_tiles_fit_an_ascend_910b(d, dv):
    need = Tiling().buffers(d=d, dv=dv)
    assert all(need[name] <= size for name, size in ASCEND_910B.items()), need


def test_tiles_of_head_dim_128_fill_the_buffers_of_cube():
    need = Tiling().buffers(d=128, dv=128)
    assert {name: need[name] for name in ("L0A", "L0B", "L0C")} == {"L0A": 64 << 10, "L0B": 64 << 10, "L0C": 128 << 10}
    assert Tiling(large=(512, 512)).buffers(d=128, dv=128)["L1"] > ASCEND_910B["L1"]


@pytest.mark.parametrize("wrong", [{"large": (64, 64)}, {"small": (0, 16)}, {"strip": 0}])
def test_impossible_tilings_are_refused(wrong):
    with pytest.raises(ValueError, match="edges are at least 1, and small tiles not larger"):
        Tiling(**wrong)
