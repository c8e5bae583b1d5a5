"""Faults planted in one kernel, weight or gradient are found where they are, and nowhere before."""

import pytest
import torch
from compare_faults import Fault, not_a_number, rounded_norm, swapped_sign, wrong_gradient, wrong_scale

from llmtrain.engine.base import ENGINES
from llmtrain.tools.compare.judge import compare
from llmtrain.tools.compare.table import text, verdict

FAULTS = [
    ("attention", wrong_scale(Fault(lambda call: call == 1)), "blocks.1.attention", "forward"),
    ("attention", wrong_scale(Fault(lambda call: call == 2)), "blocks.2.attention", "forward"),
    ("rope", swapped_sign(Fault()), "blocks.0.rope", "forward"),
    ("rope", swapped_sign(Fault(lambda call: call == 5)), "blocks.2.rope.2", "forward"),
    ("rms_norm", rounded_norm(Fault()), "blocks.0.attention_norm", "forward"),
    ("swiglu", wrong_gradient(Fault(lambda call: call == 1)), "blocks.1.ffn.gate_proj", "backward"),
]


@pytest.mark.parametrize("op, function, place, phase", FAULTS, ids=[f"{op} {place}" for op, _, place, _ in FAULTS])
def test_a_faulty_kernel_is_found_where_it_is(dense, plain, plant, op, function, place, phase):
    plant(op, function)
    found = compare(plain, dense.trace(f"kernels.{op}=faulty"))
    assert (found.first.a.name, found.first.a.phase) == (place, phase), text(found)
    assert f"first at {place} ({phase})" in verdict(found) and "B is" in verdict(found) and "A is" not in verdict(found)
    if phase == "forward":
        assert "B faulty" in verdict(found) or op == "rms_norm"
    else:
        assert not any(row.problems for row in found.rows if row.a.phase == "forward")


def test_a_fault_of_both_sides_is_seen_too(dense, plant):
    plant("rope", swapped_sign(Fault()))
    both = dense.trace("kernels.rope=faulty")
    found = compare(both, both)
    assert found.first.a.name == "blocks.0.rope" and found.first.difference == 0
    assert "A is" in verdict(found) and "B is" in verdict(found)


def test_not_a_number_is_found_with_its_index(dense, plain, plant):
    plant("swiglu", not_a_number(Fault(lambda call: call == 1)))
    found = compare(plain, dense.trace("kernels.swiglu=faulty"))
    assert found.first.a.name == "blocks.1.ffn.swiglu"
    assert "B has 1 values that are NaN or infinite, first at index [1, 7, 5] of [3, 48, 48]" in verdict(found)


def test_a_perturbed_weight_is_named(dense, plain, monkeypatch):
    build = ENGINES["native"]

    def perturbed(cfg, **parts):
        engine = build(cfg, **parts)
        with torch.no_grad():
            engine.parameters["blocks.1.attention.q_proj.weight"][3, 4] *= 1 + 1e-5
        return engine

    side = dense.side()
    reference, control = (dense.auxiliary(side, kind) for kind in ("fp64", "fp32"))
    monkeypatch.setitem(ENGINES, "native", perturbed)
    from llmtrain.tools.compare import measure
    from llmtrain.tools.compare.side import run_side

    trace = run_side(side)
    measure.measure(trace, reference=reference, control=control)
    found = compare(plain, trace)
    assert found.first.a.name == "blocks.1.attention.q_proj.weight" and found.first.a.phase == "weights"
    assert "the weights differ before the step begins" in verdict(found)
    assert sum(bool(row.problems) for row in found.rows if row.a.phase == "weights") == 1


def test_a_mixture_whose_experts_are_swapped(mixture, plant):
    from llmtrain.ops.experts import permute_reference

    plant("permute", lambda x, ids, experts: permute_reference(x.flip(0), ids, experts))
    found = compare(mixture.trace(), mixture.trace("kernels.permute=faulty"))
    assert found.first.a.name == "blocks.0.ffn.permute"
