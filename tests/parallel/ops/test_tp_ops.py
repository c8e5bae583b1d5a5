"""Collectives over the sequence, alone and fused with matmuls, and a shared vocabulary: worlds of 2 and 4 against whole tensors."""

import pytest
from worlds import run_world

EXACT = 1e-12
FUSED = {
    f"batch {batch}, {length} tokens, chunks {chunks}": {"batch": batch, "length": length, "chunks": chunks}
    for batch, length, chunks in [(1, 24, 1), (2, 24, 1), (1, 24, 2), (2, 24, 4), (3, 20, 3), (1, 20, 4), (1, 4, 4)]
}
LOSS = {
    "uneven": {},
    "even": {"vocab": 64, "chunk": 1},
    "all rows at once": {"chunk": 1000},
    "logits in the thousands": {"scale": 1000.0},
    "no targets": {"none": True},
}
JOBS = {
    "plain": {"one row": {"batch": 1, "length": 12}, "three": {"batch": 3, "length": 12}},
    "gather_matmul": FUSED | {"no bias": {"batch": 2, "length": 12, "chunks": 2, "bias": False}},
    "matmul_scatter": FUSED,
    "pair": FUSED,
    "symmetric": {"one": {"batch": 2, "length": 12, "chunks": 1}},
    "loss": LOSS | {"float32": {"dtype": "float32"}, "bfloat16": {"dtype": "bfloat16"}},
    "vocabulary": {"uneven": {"vocab": 61}, "even": {"vocab": 64}},
    "copies": {f"{batch}, {chunks}": {"batch": batch, "chunks": chunks} for batch in (1, 3) for chunks in (1, 2)},
    "timeline": {"four": {"chunks": 4}},
}


@pytest.fixture(scope="module", params=[2, 4])
def found(request, tmp_path_factory):
    return run_world("tp_ops_world:in_world", request.param, args={"jobs": JOBS}, folder=tmp_path_factory.mktemp("world"))


# The operators of symmetric memory are torch's plain versions here; their kernels need GPUs.
@pytest.mark.parametrize("function", ["plain", "gather_matmul", "matmul_scatter", "pair", "symmetric", "vocabulary"])
def test_the_formula(found, function):
    for name, differences in found[function].items():
        assert max(differences.values()) < EXACT, (name, differences)


def test_loss(found):
    for name in LOSS:
        assert max(found["loss"][name].values()) < EXACT, (name, found["loss"][name])


def test_loss_in_lower_precision(found):
    """Within the rounding of the numbers that both versions give out."""
    assert max(found["loss"]["float32"].values()) < 2e-6
    low = found["loss"]["bfloat16"]
    assert max(value for name, value in low.items() if name.startswith("d ")) < 0.02, low
    assert low["loss"] < 1e-5, low


def test_copies(found):
    """None of one batch row in one piece; in the order of arrival none ever; else one of each tensor on its way."""
    ranks = found["copies"]["1, 1"]["ranks"]
    hidden, local = ranks * 4 * 12, 4 * 16  # elements per batch row: of what a rank computes, and of its part of x
    for name in ("1, 1", "1, 2", "3, 1", "3, 2"):
        assert found["copies"][name]["as they arrive"] == [0, 0], name
    assert found["copies"]["1, 1"]["in order"] == [0, 0]
    assert found["copies"]["1, 2"]["in order"] == [2 * hidden] * 2
    assert found["copies"]["3, 1"]["in order"] == [2 * 3 * hidden] * 2
    assert found["copies"]["3, 2"]["in order"] == [2 * 3 * (hidden + local)] * 2


def test_pieces_travel_while_others_are_multiplied(found):
    order = found["timeline"]["four"]
    gather = order["gather_mm"]
    assert gather[:6] == ["gather 0", "gather 1", "wait gather 0", "mm", "gather 2", "wait gather 1"]
    assert order["mm_scatter backward"][: len(gather)] == gather, "the backward pass gathers piece by piece as well"
    assert order["mm_scatter"] == [entry for i in range(4) for entry in ("mm", f"scatter_sum {i}")]
    backward = order["gather_mm backward"]
    assert backward[:4] == [f"gather {i}" for i in range(4)], "what the weights' gradient needs comes first"
    assert backward[4:] == [*order["mm_scatter"], "mm"], "and that is computed while the last of the input's gradient is under way"
