"""What is refused before any rank starts, with the arithmetic: groups of sequences that experts are balanced over or have room for."""

import pytest
from sameness import BASE, merge

from llmtrain.config.run import RunConfig
from llmtrain.errors import UserError
from llmtrain.layout.mesh import MeshShape
from llmtrain.layout.steps import StepPlan
from llmtrain.parallel.check import check_parallel

MOE = {"kind": "moe", "experts": 4, "top_k": 2, "hidden": 16}


def check(ffn: dict, train: dict | None = None, **parallel) -> None:
    cfg = RunConfig.model_validate(merge(BASE, {"model": {"ffn": MOE | ffn}, "train": train or {}, "parallel": parallel}))
    check_parallel(cfg, MeshShape.from_config(cfg.parallel), StepPlan.from_config(cfg), device="cpu")


def balance(sequences) -> dict:
    return {"balance": {"sequences": sequences}}


OVERLAP = {"overlap_micro_batches": True}
PHASES = {"steps": None, "phases": [{"steps": 1}, {"steps": 1, "seq_len": 30}]}


def test_what_fits():
    """8 sequences of 24 tokens a step, in micro-batches of 2."""
    check({"capacity": {"sequences": 2}} | balance("step"), cp=2, tp=2)
    check(balance(4), pp=2, dp_shard=2)
    check(balance(2), pp=2)
    check({}, {"micro_batch": 1}, pp=2, dp_shard=2, ep=2, schedule="dualpipev", **OVERLAP)
    check({}, PHASES, cp=2, tp=2)  # padding may be routed where nothing counts it


@pytest.mark.parametrize(
    "ffn, options, message",
    [
        (
            balance("step"),
            {"pp": 2},
            r"balance\.sequences 8 is 4 times the 2 .*\(micro_batch 2 x 1 data ranks\).*divisor of 2, or parallel\.pp 1",
        ),
        (balance(4), {"pp": 2, "schedule": "gpipe"}, r"balance\.sequences 4 is 2 times the 2 sequences"),
        (balance(3), {}, r"balance\.sequences 3 does not divide the 8 sequences of a step"),
        (balance(4), {"train": {"micro_batch": 3, "global_batch": 12}}, r"balance\.sequences 4 and train\.micro_batch 3: one must divide"),
        (
            balance(8),
            {"train": {"global_batch": 24}, "dp_shard": 6},
            r"balance\.sequences 8 and the 12 sequences that are computed at once \(micro_batch 2 x 6 data ranks\): one must divide",
        ),
        ({}, {"dp_shard": 2, "ep": 2} | OVERLAP, r"overlap_micro_batches .* needs parallel\.pp 1 and parallel\.ep 2 of 2 or more"),
        ({}, {"pp": 2, "dp_shard": 2, "ep": 2} | OVERLAP, r"overlap_micro_batches: schedule 1f1b has no pairs"),
        ({"capacity": {"sequences": 4}}, {}, r"capacity\.sequences 4 does not divide the 2 sequences of a micro-batch \(phase-0\)"),
        (
            {"capacity": {}, "router": {"bias_rate": 0.1}},
            {"train": PHASES, "cp": 2, "tp": 2},
            r"model\.ffn\.capacity, model\.ffn\.router\.bias_rate: .* the 30 tokens of a sequence \(phase-1\) .* cp 2 x tp 2 = 4 ranks",
        ),
        (
            balance(2) | {"router": {"z_loss": 0.1}},
            {"train": PHASES, "tp": 4},
            r"model\.ffn\.balance, model\.ffn\.router\.z_loss: .*tp 4 = 4",
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_the_arithmetic(ffn, options, message):
    with pytest.raises(UserError, match=message):
        check(ffn, **options)
