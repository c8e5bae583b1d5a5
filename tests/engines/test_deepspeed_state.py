"""Canonical state of engine deepspeed: in and out bit for bit, from engine to engine and world to world; steps that are discarded."""

from itertools import pairwise

import numpy as np
import pytest
from sameness import BASE, loss_difference, merge, norm_difference
from worlds import run_world
from zero_world import EVERY_PARAMETER, same_bits

pytestmark = pytest.mark.deepspeed


def zero(stage: int, ranks: int = 2, **engine) -> dict:
    """Changes that run a model under ZeRO."""
    whole = {"options": EVERY_PARAMETER} if stage == 3 else {}
    return {"engine": {"kind": "deepspeed", "zero": stage} | whole | engine, "parallel": {"dp_shard": ranks}}


def ranks_of(changes: dict) -> int:
    return changes.get("parallel", {}).get("dp_shard", 1)


@pytest.fixture(scope="module")
def journey(tmp_path_factory) -> list[dict]:
    """A run of 14 steps that changes engine, stage and world six times, two steps each."""
    folder = tmp_path_factory.mktemp("journey")
    legs = [{}, zero(2), zero(3), zero(1, offload_optimizer="cpu"), zero(3, 1), zero(0), {"parallel": {"dp_shard": 2}}]
    found = []
    for number, changes in enumerate(legs):
        args = {"changes": changes, "folder": str(folder), "start": 2 * number, "steps": 2}
        place = tmp_path_factory.mktemp(f"leg-{number}")
        found.append(run_world("zero_world:leg", ranks_of(changes), args=args, folder=place))
    return found


def test_state_is_taken_over_bit_for_bit(journey):
    for before, after in pairwise(journey):
        assert same_bits(after["loaded"], before["saved"])
    assert journey[-1]["saved"]["step"] == 14


def test_the_curve_is_that_of_the_run_that_never_changed(journey, tmp_path_factory):
    scenarios = {name: {"changes": {}, "stop": 14} | extra for name, extra in {"alone": {}, "control": {"permute": True}}.items()}
    runs = run_world("sameness:train_all", 1, args={"scenarios": scenarios}, folder=tmp_path_factory.mktemp("alone"))
    whole = {part: [value for leg in journey for value in leg[part]] for part in ("losses", "norms")}
    control = loss_difference(runs["control"], runs["alone"])
    found = loss_difference(whole, runs["alone"])
    print(f"losses {found:.1e}, control {control:.1e}; norms {norm_difference(whole, runs['alone']):.1e}")
    assert found <= 5 * control


def test_masters_of_16_bits_come_and_go_exactly(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bf16")
    legs = [{}, zero(1), zero(2), zero(3), {"parallel": {"dp_shard": 2}}]
    found = []
    for number, changes in enumerate(legs):
        args = {"changes": changes | {"precision": "bf16"}, "folder": str(folder), "start": 2 * number, "steps": 2, "minus_zero": True}
        found.append(run_world("zero_world:leg", ranks_of(changes), args=args, folder=tmp_path_factory.mktemp(f"bf16-{number}")))
    for before, after in pairwise(found):
        assert same_bits(after["loaded"], before["saved"])
        moment = after["loaded"]["final_norm.weight.exp_avg"]
        assert moment[0] == 0 and np.signbit(moment[0]), "the sign of a zero is lost"
    weight = found[1]["saved"]["blocks.0.attention.q_proj.weight.weight"]
    assert weight.dtype == np.float32 and (weight.view(np.uint32) & 0xFFFF).any(), "the masters are those of 16 bits"


CASES = {
    "zero 0": zero(0),
    "zero 1": zero(1),
    "zero 2": zero(2),
    "zero 3": zero(3),
    "zero 1, offload": zero(1, offload_optimizer="cpu"),
    "zero 2, offload": zero(2, offload_optimizer="cpu"),
    "zero 3, offload": zero(3, offload_optimizer="cpu", offload_params="cpu"),
    "zero 1, bf16": zero(1) | {"precision": "bf16"},
    "zero 2, bf16": zero(2) | {"precision": "bf16"},
    "zero 3, bf16": zero(3) | {"precision": "bf16"},
    "zero 1, biases": zero(1) | {"model": {"ffn": {"kind": "moe", "experts": 4, "top_k": 2, "hidden": 16, "router": {"bias_rate": 0.1}}}},
}


@pytest.fixture(scope="module")
def discards(tmp_path_factory) -> dict[str, dict]:
    cases = {name: merge(changes, {"train": {"micro_batch": 1}}) for name, changes in CASES.items()}
    return run_world("zero_world:given_up", 2, args={"cases": cases}, folder=tmp_path_factory.mktemp("discards"))


@pytest.mark.parametrize("name", CASES)
def test_a_discarded_step_leaves_no_trace(discards, name):
    found = discards[name]
    assert found["unchanged"] and found["nan"] and found["same"]
    assert found["figures"][0] == found["figures"][1]


FP16 = {"precision": {"compute": "fp16", "loss_scale": {"init": 2.0**21, "growth_every": 3}}}


@pytest.fixture(scope="module")
def scaled(tmp_path_factory) -> dict[str, dict]:
    cases = {"native": {"parallel": {"dp_shard": 2}}} | {f"zero {stage}": zero(stage) for stage in (1, 2, 3)}
    args = {"cases": {name: changes | FP16 for name, changes in cases.items()}, "steps": 12}
    return run_world("zero_world:scaled", 2, args=args, folder=tmp_path_factory.mktemp("scaled"))


@pytest.mark.parametrize("stage", (1, 2, 3))
def test_the_loss_scale_of_fp16_moves_as_under_engine_native(scaled, stage):
    found, native = scaled[f"zero {stage}"], scaled["native"]
    lost = [norm is None for norm in native["norms"]]
    assert [norm is None for norm in found["norms"]] == lost and found["scales"] == native["scales"]
    assert True in lost and any(after > before for before, after in pairwise(native["scales"])), "the scale falls and rises"
    assert all(found["alone"]) and found["taken"] == native["taken"] == lost.count(False)
    # Once weights have moved, one that differs in the last bit of fp32 may round to the other neighbour in fp16, whose steps are 1e-3.
    for measure, bound in (("losses", 5e-4), ("norms", 2e-2)):
        apart = [0.0 if gone else abs(a - b) / b for a, b, gone in zip(found[measure], native[measure], lost)]
        moved = lost.index(False) + 1
        print(f"zero {stage}, {measure}: {max(apart[:moved]):.1e} before the first update, {max(apart[moved:]):.1e} after it")
        assert max(apart[:moved]) < 1e-6 and max(apart[moved:]) < bound


@pytest.fixture(scope="module")
def evaluations(tmp_path_factory) -> dict[str, dict]:
    cases = {f"zero {stage}": zero(stage) for stage in range(4)}
    folder = tmp_path_factory.mktemp
    return {
        **run_world("zero_world:evaluated", 1, args={"cases": {"native": {}}}, folder=folder("one")),
        **run_world("zero_world:evaluated", 2, args={"cases": cases}, folder=folder("two")),
    }


@pytest.mark.parametrize("stage", range(4))
def test_evaluation_and_logits_are_the_native_engines(evaluations, stage):
    found, native = evaluations[f"zero {stage}"], evaluations["native"]
    assert found["loss"] == pytest.approx(native["loss"], rel=1e-6)
    assert found["next"] == pytest.approx(native["next"], rel=1e-5)
    np.testing.assert_allclose(found["logits"], native["logits"], atol=1e-4)
    assert found["weights"].keys() == native["weights"].keys()
    for name, weight in native["weights"].items():
        np.testing.assert_allclose(found["weights"][name], weight, atol=2e-4, err_msg=name)


def test_what_is_auto_is_measured_and_kept(tmp_path_factory):
    auto = {"model": {"norm": {"c_attention": "auto", "c_ffn": "auto"}}}
    native = run_world("zero_world:measured", 1, args={"cases": {"native": auto}}, folder=tmp_path_factory.mktemp("one"))["native"]
    cases = {f"zero {stage}": zero(stage) | auto for stage in (0, 2, 3)} | {"bf16": zero(3) | auto | {"precision": "bf16"}}
    for name, found in run_world("zero_world:measured", 2, args={"cases": cases}, folder=tmp_path_factory.mktemp("two")).items():
        close = {"rel": 2e-2 if name == "bf16" else 1e-5}
        assert found["values"] == pytest.approx(native["values"], **close), name
        gamma = found["state"]["blocks.1.post_ffn_norm.weight.weight"]
        np.testing.assert_allclose(gamma, found["values"]["c_ffn"] / BASE["model"]["layers"] ** 0.5, rtol=1e-6, err_msg=name)
        assert found["step"][0] == pytest.approx(native["step"][0], rel=2e-2 if name == "bf16" else 1e-6), name
