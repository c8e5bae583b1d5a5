"""ZeRO 0 to 3 train as one process of the native engine does: losses, norms and routing of 20 steps, gradients of step 1 one by one.

Float32, since DeepSpeed has no float64: within 5 times what a control run differs by (one process, the batch order inside each step
permuted). That is enough for the mixtures of experts too: ranks that read different samples change the order of sums as the control does.
"""

import numpy as np
import pytest
from parity_rows import FULL, Row, references
from sameness import gradient_difference, loss_difference, norm_difference, routing_difference
from worlds import run_world
from zero_world import EVERY_PARAMETER

pytestmark = pytest.mark.deepspeed
FACTOR = 5
OFFLOAD = {"engine.offload_optimizer": "cpu"}
ACCUMULATE = {"train.micro_batch": 1}


def zero(stage: int, model: str = "GQA", options: dict | None = None, *, ranks: int = 2) -> Row:
    """A row of the matrix under ZeRO; at stage 3 small parameters are partitioned too."""
    whole = {"engine.options": EVERY_PARAMETER} if stage == 3 else {}
    return Row({"dp_shard": ranks}, model, {"engine.kind": "deepspeed", "engine.zero": stage} | whole | (options or {}))


ROWS = {
    "zero 0": zero(0),
    "zero 1": zero(1),
    "zero 2": zero(2),
    "zero 3": zero(3),
    "zero 0, four micro-batches": zero(0, options=ACCUMULATE),
    "zero 1, four micro-batches": zero(1, options=ACCUMULATE),
    "zero 2, four micro-batches": zero(2, options=ACCUMULATE),
    "zero 3, four micro-batches": zero(3, options=ACCUMULATE),
    "zero 1, offload": zero(1, options=OFFLOAD | ACCUMULATE),
    "zero 2, offload": zero(2, options=OFFLOAD | ACCUMULATE),
    "zero 3, offload": zero(3, options=OFFLOAD | ACCUMULATE | {"engine.offload_params": "cpu"}),
    "zero 3, recompute": zero(3, options=FULL),
    "zero 1, GPT": zero(1, "GPT"),
    "zero 2, tied": zero(2, "tied"),
    "zero 3, tied": zero(3, "tied"),
    "zero 3, MTP": zero(3, "MTP"),
    "zero 2, MoE": zero(2, "MoE"),
    "zero 3, MoE": zero(3, "MoE"),
    "zero 2, DeepSeek": zero(2, "DeepSeek"),
}
FOUR = {f"zero {stage}, 4 ranks": zero(stage, ranks=4) for stage in (1, 2, 3)}
EVERY = ROWS | FOUR


def world(ranks: int, scenarios: dict, tmp_path_factory) -> dict:
    return run_world("sameness:train_all", ranks, args={"scenarios": scenarios}, folder=tmp_path_factory.mktemp(f"world-{ranks}"))


@pytest.fixture(scope="session")
def alone(tmp_path_factory) -> dict[str, dict]:
    """The one-process runs of the native engine."""
    kinds = ("fp32", "control")
    wanted = {name: scenario for row in EVERY.values() for name, scenario in references(row).items() if name.endswith(kinds)}
    return world(1, wanted, tmp_path_factory)


@pytest.fixture(scope="session")
def two(tmp_path_factory) -> dict[str, dict]:
    return world(2, {name: row.scenario("fp32") for name, row in ROWS.items()}, tmp_path_factory)


@pytest.fixture(scope="session")
def four(tmp_path_factory) -> dict[str, dict]:
    return world(4, {name: row.scenario("fp32") for name, row in FOUR.items()}, tmp_path_factory)


def judge(name: str, run: dict, alone: dict[str, dict]) -> None:
    row = EVERY[name]
    one = alone[f"{row.reference} | fp32"]
    for measure in (loss_difference, gradient_difference, norm_difference):
        control = measure(alone[f"{row.reference} | control"], one)
        found = measure(run, one)
        print(f"{name}: {measure.__name__} {found:.1e}, control {control:.1e}")
        assert control > 0
        assert found <= FACTOR * control
    assert routing_difference(run, one)[0] == 0
    assert max(one["norms"]) > 1, "no step clips"


@pytest.mark.parametrize("name", ROWS)
def test_two_ranks_train_as_one_process_does(two, alone, name):
    judge(name, two[name], alone)


@pytest.mark.slow
@pytest.mark.parametrize("name", FOUR)
def test_four_ranks_train_as_one_process_does(four, alone, name):
    judge(name, four[name], alone)


def test_ranks_hold_other_numbers_of_targets(two):
    counts = two["zero 2, four micro-batches"]["counts"]
    assert len({count for rank in counts for count in rank}) > 2 and len({sum(rank) for rank in counts}) == 2


def test_a_mean_over_ranks_of_means_is_seen(tmp_path_factory, alone):
    broken = world(2, {"broken": ROWS["zero 2"].scenario("fp32", fault="count", stop=4)}, tmp_path_factory)["broken"]
    one = alone["GQA | fp32"]
    assert loss_difference(broken, one) > 1e-4 and gradient_difference(broken, one) > 1e-3


def test_every_parameter_has_a_gradient(two, alone):
    one = alone["DeepSeek | fp32"]["gradients"]
    found = two["zero 2, DeepSeek"]["gradients"]
    assert found.keys() == one.keys() and all(np.isfinite(gradient).all() and gradient.any() for gradient in found.values())
