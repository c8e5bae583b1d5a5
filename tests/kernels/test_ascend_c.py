"""The Ascend C kernel: the source itself, run on the CPU by its host shim, against the formula in float64. It has no backward pass."""

import shutil
from dataclasses import replace
from functools import partial

import pytest
import torch
from attention_calls import AttentionCall, Matrix, calls
from attention_harness import check, check_mask
from hypothesis import given, settings
from llmtrain_kernels import Mask
from llmtrain_kernels.ascend_c import shim
from llmtrain_kernels.tiling import ASCEND_910B
from llmtrain_kernels.tiling_attention import attention as reference
from llmtrain_kernels.tiling_counts import Counts

pytestmark = pytest.mark.skipif(shim.compiler() is None, reason="the host shim needs g++")

BOUNDS = {"out": 1e-3, "lse": 2e-6}
"""Weights are rounded to fp16 (2**-11) before their product, results once more; sums are fp32."""

MATRIX = Matrix(tile=128, longest=300, head_dims=((64, 64), (128, 128)), windows=False, documents=False)
WIDE = AttentionCall(Mask(), rows=2, heads=4, kv_heads=2, queries=528, keys=528, lse=True)
CACHE = AttentionCall(Mask(), heads=2, queries=272, keys=784, d=128, dv=128, q_offset=512, lse=True)
RAGGED = AttentionCall(Mask(), heads=4, kv_heads=2, queries=290, keys=523, q_offset=233, lse=True)
FULL = AttentionCall(Mask(causal=False), queries=300, keys=600, d=128, dv=128, lse=True)


@settings(max_examples=25, deadline=None)
@given(call=calls(MATRIX).map(lambda call: replace(call, kv_offset=0)))
def test_values_and_every_bit_of_the_mask(call):
    check(shim.attention, call, dtype=torch.float16, backward=False, bounds=BOUNDS)
    check_mask(shim.attention, call, dtype=torch.float16, backward=False)


def counted(call):
    """What the shim and the specification count for a call."""
    tensors = [
        torch.randn(call.rows, heads, length, call.d).half()
        for heads, length in ((call.heads, call.queries), (call.kv_heads, call.keys), (call.kv_heads, call.keys))
    ]
    counts = Counts()
    reference(*tensors, tiling=shim.TILING, counts=counts, **call.options())
    with shim.watch() as reports:
        shim.attention(*tensors, **call.options())
    return reports[0], counts


@pytest.mark.parametrize("call", [WIDE, CACHE, RAGGED, FULL], ids=["wide", "cache", "ragged", "full"])
def test_hand_overs_and_tiles_are_those_of_the_specification(call):
    check(shim.attention, call, dtype=torch.float16, backward=False, bounds=BOUNDS)
    report, counts = counted(call)
    assert report.by_flag() == dict.fromkeys(shim.FLAGS, counts.hand_overs) and counts.hand_overs > 1
    assert report.products == 2 * counts.small_visited > 2 * counts.hand_overs
    assert (counts.large_skipped > 0) == call.mask.causal


@pytest.mark.parametrize("call", [WIDE, CACHE], ids=["wide", "cache"])
def test_bytes_moved_are_those_of_the_specification(call):
    report, counts = counted(replace(call, kv_heads=call.heads))
    moved = report.by_way()
    assert 2 * moved["L1 > L0"] == counts.moved["L1 > L0"] > 0  # which are fp32 there
    shared = call.rows * call.heads  # whose masks the specification loads once, of bytes
    assert moved["mask > UB"] == 2 * shared * counts.moved["mask > UB"] > 0


def test_causal_small_tiles_are_skipped():
    products = {}
    for causal in (True, False):
        report, _ = counted(AttentionCall(Mask(causal=causal), queries=512, keys=512))
        products[causal] = report.products
    assert products == {True: 2 * (4 * 5 // 2), False: 2 * 4 * 4}


@pytest.mark.parametrize("width", shim.WIDTHS)
def test_buffers_of_a_core_hold_it(width):
    report, _ = counted(AttentionCall(Mask(), queries=32, keys=32, d=width, dv=width))
    peak, need = report.by_place(), shim.TILING.buffers(d=width, dv=width)
    assert all(0 < need[name] <= peak[name] <= ASCEND_910B[name] for name in ("UB", "L0C")) and peak["L1"] <= ASCEND_910B["L1"]


def test_every_run_gives_the_same_bits_on_any_number_of_cores():
    tensors = [torch.randn(2, 2, 270, 64).half() for _ in range(3)]
    first, *others = (shim.attention(*tensors, mask=Mask(), return_lse=True, cores=cores) for cores in (2, 2, 1, 5))
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other))


MUTATIONS = {
    "column of the mask": ("vector.h", "distance >= 0 ? 0 : -distance;", "distance >= 0 ? 0 : -distance + 1;"),
    "row of the mask": ("vector.h", "distance >= 0 ? distance : 0,", "distance >= 0 ? distance + 1 : 0,"),
    "hidden too early": ("tiles.h", "distance <= -static_cast<int32_t>(rows)", "distance <= 1 - static_cast<int32_t>(rows)"),
    "visible too early": ("tiles.h", "static_cast<int32_t>(columns) - 1)", "static_cast<int32_t>(columns) - 2)"),
    "beyond the last key": ("vector.h", "~0ULL << columns % LANES", "~1ULL << columns % LANES"),
    "left operand": (
        "cube.h",
        "row / FRACTAL + down;\n            LoadData(to[down * params.repeatTimes",
        "down;\n            LoadData(to[down * params.repeatTimes",
    ),
    "V as it lies": ("cube.h", "params.ifTranspose = true;", ""),
    "shrink of another tile": ("vector.h", "Spread(shrinks[turn % 2", "Spread(shrinks[(turn + 1) % 2"),
    "keys of another head": ("tiles.h", "head % all.heads / (all.heads / all.kvHeads)", "head % all.kvHeads"),
}
FAULTS = {
    "scores are not waited for": ("vector.h", "CrossCoreWaitFlag(SCORES);", "", "which nobody wrote|before the flag of Cube"),
    "weights are not waited for": ("cube.h", "CrossCoreWaitFlag(WEIGHTS);", "", "which nobody wrote|before the flag of Vector"),
    "values are not waited for": ("vector.h", "CrossCoreWaitFlag(VALUES);", "", "which nobody wrote|before the flag of Cube"),
    "a flag is missing": ("cube.h", "CrossCoreSetFlag<CORES_OF_ONE, PIPE_FIX>(VALUES);", "", r"nobody will set .* Vector 0.0 flag 2;"),
    "a flag of the wrong pipe": ("vector.h", "PIPE_MTE3>(WEIGHTS)", "PIPE_V>(WEIGHTS)", "before the flag of Vector"),
    "one slot": (
        "tiles.h",
        "(turn % 2 * LARGE + row) * LARGE + column",
        "(turn * 0 + row) * LARGE + column",
        "before the flag|may still read",
    ),
    "UB too small": ("vector.h", "InitBuffer(scores, 2", "InitBuffer(scores, 8", "bytes of UB, it has 196608"),
    "L1 too small": ("cube.h", "InitBuffer(weightsL1, 1", "InitBuffer(weightsL1, 3", "bytes of L1, it has 524288"),
    "L0C too small": ("cube.h", "InitBuffer(sums, 2", "InitBuffer(sums, 3", "bytes of L0C, it has 131072"),
    "part of a block": (
        "vector.h",
        "DataCopy(outputs[(first + row) * D], result, count * D)",
        "DataCopy(outputs[(first + row) * D], result, 7)",
        "multiple of 32",
    ),
    "misaligned in UB": ("vector.h", "DataCopy(strip[column], ", "DataCopy(strip[column + 1], ", "not a multiple of 32"),
    "beyond the keys": (
        "cube.h",
        "OfTile(keys, block, tile), block.Columns(tile)",
        "OfTile(keys, block, tile), LARGE",
        "outside of the tensors",
    ),
    "not freed": ("vector.h", "masks.FreeTensor(view);", "", "no free tensor of UB"),
    "not taken from the queue": ("vector.h", "view = masks.DeQue<half>();", "", "waits in its queue"),
    "no barrier": (
        "vector.h",
        "Exp(strip, strip, count * width);\n        PipeBarrier<PIPE_V>();",
        "Exp(strip, strip, count * width);",
        "vector does not wait for vector",
    ),
    "sums overtake": ("cube.h", "PipeBarrier<PIPE_M>();", "", "cube does not wait for cube"),
}
SMALL = AttentionCall(Mask(), heads=4, kv_heads=2, queries=170, keys=419, q_offset=257, lse=True)
"""A strip of it sees one key of a small tile with its last query alone, and another misses the last key with its first query alone."""


def mutated(folder, file, old, new):
    """The kernel with one thing changed."""
    shutil.copytree(shim.FOLDER, folder, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    text = (folder / file).read_text()
    assert text.count(old) == 1, f"{file} has {text.count(old)} of: {old}"
    (folder / file).write_text(text.replace(old, new))
    return partial(shim.attention, loaded=shim.library(folder, "-O1"))


@pytest.mark.parametrize("name", MUTATIONS)
def test_one_wrong_index_is_found(name, tmp_path):
    attention = mutated(tmp_path / "ascend_c", *MUTATIONS[name])
    with pytest.raises(AssertionError, match=r"error|differ"):
        check(attention, SMALL, dtype=torch.float16, backward=False, bounds=BOUNDS)
        check_mask(attention, replace(SMALL, heads=1, kv_heads=1), dtype=torch.float16, backward=False)


@pytest.mark.parametrize("name", FAULTS)
def test_what_only_fails_on_an_npu_is_found(name, tmp_path):
    *change, message = FAULTS[name]
    attention = mutated(tmp_path / "ascend_c", *change)
    with pytest.raises(shim.ShimError, match=message):
        check(attention, SMALL, dtype=torch.float16, backward=False, bounds=BOUNDS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": torch.bfloat16}, "takes fp16"),
        ({"width": 96}, r"takes \(64, 128\)"),
        ({"mask": Mask(window=8)}, "without documents or window"),
        ({"heads": 3}, "H a multiple of K"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    given = {"dtype": torch.float16, "width": 64, "mask": Mask(), "heads": 4} | change
    q, k, v = (torch.zeros(1, heads, 8, given["width"], dtype=given["dtype"]) for heads in (given["heads"], 2, 2))
    with pytest.raises(ValueError, match=message):
        shim.attention(q, k, v, mask=given["mask"])
