"""The Volta kernels: the CUDA source itself, run on the CPU by the host shim, against the formula in float64."""

import math
import shutil
from functools import partial

import pytest
import torch
from attention_call import AttentionCall
from attention_calls import Matrix, calls
from attention_harness import check, check_mask
from hypothesis import given, settings
from llmtrain_kernels import Mask
from llmtrain_kernels.volta import attention as volta
from llmtrain_kernels.volta import shim, volta_attention
from llmtrain_kernels.volta.sources import FOLDER

pytestmark = pytest.mark.skipif(shim.compiler() is None, reason="the host shim needs g++")

BOUNDS = {"out": 1e-3, "lse": 2e-6, "dq": 2e-3, "dk": 2e-3, "dv": 1e-3}
"""P and dS are rounded to fp16 (2**-11) before their products, results once more; sums are fp32."""

HALF_BOUNDS = {"out": 2e-2, "lse": 1e-2, "dq": 2e-2, "dk": 2e-2, "dv": 2e-2}
"""Scores summed in fp16: each of d/4 steps rounds at 2**-11 of a score of up to about 16, before the scale."""

MATRIX = Matrix(tile=32, longest=140, head_dims=((64, 64), (96, 96), (128, 128), (80, 40)))
WIDE = AttentionCall(Mask(documents=((300, 90), (200, 190))), rows=2, heads=2, queries=390, keys=390, d=128, dv=128, lse=True)
SHIFTED = AttentionCall(Mask(window=70), heads=2, queries=150, keys=170, q_offset=60, kv_offset=20, lse=True)


@settings(max_examples=60, deadline=None)
@given(call=calls(MATRIX))
def test_values_gradients_and_every_bit_of_the_mask(call):
    with shim.watch() as launches:
        check(volta_attention, call, dtype=torch.float16, bounds=BOUNDS)
    check_mask(volta_attention, call, dtype=torch.float16)
    assert launches and not sum(report.conflicts for _, report in launches)


@pytest.mark.parametrize("call", [WIDE, SHIFTED], ids=["documents", "window"])
def test_several_tiles_of_rows_and_columns(call):
    with shim.watch() as launches:
        check(volta_attention, call, dtype=torch.float16, bounds=BOUNDS)
    assert {launch.kernel.name for launch, _ in launches} == {"volta_forward", "volta_grad_q", "volta_grad_k", "volta_grad_v"}
    assert not sum(report.conflicts for _, report in launches) and all(report.loads > report.stores > 0 for _, report in launches)


@settings(max_examples=10, deadline=None)
@given(call=calls(MATRIX))
def test_scores_in_fp16(call):
    check(partial(volta_attention, half_scores=True), call, dtype=torch.float16, bounds=HALF_BOUNDS)
    check_mask(partial(volta_attention, half_scores=True), call, dtype=torch.float16, backward=False)


def test_scores_in_fp16_do_not_overflow_where_their_unscaled_sums_would():
    q = torch.full((1, 1, 2, 128), 30.0, dtype=torch.float16)  # 128 * 900 is beyond fp16
    out, lse = volta_attention(q, q, q, mask=Mask(causal=False), return_lse=True, half_scores=True)
    torch.testing.assert_close(out, q, rtol=1e-3, atol=0)
    torch.testing.assert_close(lse, torch.full_like(lse, 900 * math.sqrt(128) + math.log(2)), rtol=8e-3, atol=0)  # 32 roundings to fp16


def test_causal_blocks_are_skipped():
    counts = {}
    for causal in (True, False):
        call = AttentionCall(Mask(causal=causal), queries=512, keys=512)
        with shim.watch() as launches:
            check(volta_attention, call, dtype=torch.float16, bounds=BOUNDS)
        counts[causal] = {launch.kernel.name: report.products for launch, report in launches}
    strips = 16 * 17 / 2 / 16**2  # of 32 rows and 32 columns, at or below the diagonal
    assert all(counts[True][name] == strips * counts[False][name] for name in counts[True])


def test_every_run_gives_the_same_bits():
    q, k, v = (torch.randn(1, heads, 200, 64).half().requires_grad_() for heads in (4, 2, 2))
    runs = [torch.autograd.grad(volta_attention(q, k, v, mask=Mask()).sum(), (q, k, v)) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs))


MUTATIONS = {
    "mask bit": ("attention.cu", "at >= seen[r].y) sums", "at > seen[r].y) sums"),
    "column of a sum": ("tile.cuh", "2 * odd + (v & 4)", "2 * odd + (v & 4) / 2"),
    "row of a sum": ("tile.cuh", "(id & ~2) + 2 * r;", "(id & ~2) + 2 * (1 - r);"),
    "operand swap": ("tile.cuh", "operand[2 * i] = lane.odd ? other : first[i];", "operand[2 * i] = lane.odd ? first[i] : other;"),
    "fragment row": ("tile.cuh", "t((id & 3) | (id >> 4 << 2))", "t((id & 3) | (id >> 3 & 1) << 2)"),
    "chunk of V": ("tile.cuh", "2 * pair ^ (k & 1) * 4", "2 * pair"),
    "skipped strip": ("attention.cu", "seen[r].x < column + STRIP", "seen[r].x < column"),
    "whole strip": ("attention.cu", "seen[r].y >= column + STRIP;", "seen[r].y >= column;"),
}
FAULTS = {
    "no barrier": ("attention.cu", "block_barrier();\n", "\n", "raced for|nobody wrote it"),
    "one stage": ("attention.cu", "2 * STAGES + 2 * TILE - stage, more", "stage, more", "raced for"),
    "beyond the tensor": ("tile.cuh", "row + down < end", "row + down <= end", "outside of the tensors"),
    "past shared memory": (
        "attention.cu",
        "u32 stage = STAGES;",
        "u32 stage = STAGES + 2 * TILE + 2 * ROW_BYTES;",
        "shared memory at byte",
    ),
    "a lane apart": (
        "attention.cu",
        "const bool partly = any_lane(!all);",
        "const bool partly = lane.id && any_lane(!all);",
        "lane 0 is at",
    ),
}


def mutated(folder, file, old, new):
    """The sources in `folder`, with one thing changed."""
    shutil.copytree(FOLDER, folder, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    text = (folder / file).read_text()
    assert text.count(old) == 1, f"{file} has {text.count(old)} of: {old}"
    (folder / file).write_text(text.replace(old, new))
    return folder


SMALL = AttentionCall(Mask(documents=((70, 87),), window=60), heads=2, queries=157, keys=157, lse=True)


@pytest.mark.parametrize("name", MUTATIONS)
def test_one_wrong_index_is_found(name, tmp_path, monkeypatch):
    folder = mutated(tmp_path / "volta", *MUTATIONS[name])
    monkeypatch.setattr(shim, "launch", partial(shim.launch, folder=folder))
    with pytest.raises(AssertionError, match=r"error|differ"):
        check(volta_attention, SMALL, dtype=torch.float16, bounds=BOUNDS)
        check_mask(volta_attention, SMALL, dtype=torch.float16)


@pytest.mark.parametrize("name", FAULTS)
def test_what_only_fails_on_a_gpu_is_found(name, tmp_path, monkeypatch):
    *change, message = FAULTS[name]
    folder = mutated(tmp_path / "volta", *change)
    monkeypatch.setattr(shim, "launch", partial(shim.launch, folder=folder))
    with pytest.raises(shim.ShimError, match=message):
        check(volta_attention, SMALL, dtype=torch.float16, bounds=BOUNDS)


def test_bank_conflicts_are_counted(tmp_path, monkeypatch):
    folder = mutated(tmp_path / "volta", "tile.cuh", "row * ROW_BYTES + (row & 7) * 16", "row * ROW_BYTES")
    monkeypatch.setattr(shim, "launch", partial(shim.launch, folder=folder))
    with shim.watch() as launches:
        volta_attention(*(torch.randn(1, 1, 64, 64).half() for _ in range(3)), mask=Mask())
    assert launches[0][1].conflicts > 0


@pytest.mark.parametrize(
    ("bytes_each", "stride", "conflicts"),
    [(4, 4, 0), (4, 8, 1), (4, 128, 31), (4, 0, 0), (8, 8, 0), (8, 128, 2 * 15), (16, 16, 0), (16, 128, 4 * 7), (16, 144, 0), (16, 0, 0)],
)
def test_the_rule_of_bank_conflicts(bytes_each, stride, conflicts):
    import ctypes

    addresses, active = (ctypes.c_uint * 32)(*(stride * lane for lane in range(32))), (ctypes.c_ubyte * 32)(*[1] * 32)
    assert shim.library(64).volta_shim_conflicts(addresses, active, bytes_each) == conflicts


@pytest.mark.parametrize("options", [{}, {"half_scores": True}])
def test_the_operators_are_as_torch_wants_them(options):
    q, k, v = (torch.randn(1, heads, 40, 64).half().requires_grad_() for heads in (2, 1, 1))
    half = options.get("half_scores", False)
    arguments = (q, k, v, True, 0, [], [], [0, 0], 0.125, half)
    torch.library.opcheck(volta._forward, arguments, test_utils=("test_schema", "test_faketensor", "test_autograd_registration"))


def test_compiled_it_is_the_same():
    tensors = [torch.randn(1, 2, 40, 64).half().requires_grad_() for _ in range(3)]

    def loss(q, k, v):
        return volta_attention(q * 2, k, v, mask=MASK).float().square().sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for a, b in zip(torch.autograd.grad(loss(*tensors), tensors), torch.autograd.grad(compiled(*tensors), tensors)):
        torch.testing.assert_close(a, b)


MASK = Mask(documents=((15, 25),))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": torch.bfloat16}, "Volta has no bfloat16"),
        ({"width": 136}, "take up to 128"),
        ({"scale": -1.0}, "scale=-1.0; it must be above 0"),
        ({"heads": 3}, "H a multiple of K"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    given = {"dtype": torch.float16, "width": 64, "scale": None, "heads": 4} | change
    q, k, v = (torch.zeros(1, heads, 8, given["width"], dtype=given["dtype"]) for heads in (given["heads"], 2, 2))
    with pytest.raises(ValueError, match=message):
        volta_attention(q, k, v, mask=Mask(), scale=given["scale"])
