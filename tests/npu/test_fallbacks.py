"""Training never leaves the NPU: torch_npu has a kernel for every op of a step. What falls back elsewhere is listed in docs/npu.md."""

import re
from pathlib import Path

import pytest
import stand_in

stand_in.start()

import sameness  # noqa: E402
import torch  # noqa: E402
from fallbacks import Fallbacks  # noqa: E402
from parity_rows import MODELS  # noqa: E402

from llmtrain.config.run import RunConfig  # noqa: E402
from llmtrain.layout.steps import StepPlan  # noqa: E402
from llmtrain.model.decode import CachedRunner, Decoder  # noqa: E402
from llmtrain.model.sampling import Sampling  # noqa: E402
from llmtrain.train.stream import micro_batches  # noqa: E402

PAGE = Path(__file__).parents[2] / "docs/npu.md"
PLAIN = dict.fromkeys(("attention", "cross_entropy", "rms_norm", "add_rms_norm", "rope", "swiglu", "permute", "unpermute"), "reference") | {
    "grouped_mm": "loop"
}
STEPS = {
    "dense": {},
    "dense, plain": {"kernels": PLAIN},
    "dense, bf16": {"precision": "bf16"},
    "dense, fp16": {"precision": "fp16"},
    "MoE": {"model": MODELS["MoE"]},
    "MoE, plain": {"model": MODELS["MoE"], "kernels": PLAIN},
    "GPT": {"model": MODELS["GPT"]},
    "MTP": {"model": MODELS["MTP"]},
    "recomputed": {"train": {"recompute": "selective"}},
}


@pytest.fixture(scope="module", autouse=True)
def world():
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def one_step(changes: dict) -> Fallbacks:
    """A second optimizer step: what only the first one does is no part of it."""
    torch.set_num_threads(1)
    cfg = RunConfig.model_validate(sameness.merge(sameness.BASE, changes))
    engine = sameness.build_engine(cfg, "npu")
    plan, data, audit = StepPlan.from_config(cfg), sameness.Documents(), Fallbacks()
    for index in range(2):
        step = plan.step(index)
        with audit:
            audit.found.clear()
            engine.forward_backward(micro_batches(step, data, rank=0, ranks=1))
            engine.grad_norm()
            engine.overflowed()
            engine.apply(lr=step.lr)
    return audit


@pytest.mark.parametrize("name", STEPS)
def test_no_op_of_a_training_step_falls_back(name):
    audit = one_step(STEPS[name])
    assert audit.seen["aten::_fused_adamw_"] >= 2 and audit.seen["aten::matmul"] + audit.seen["aten::mm"] > 20, audit.seen
    assert audit.found == {}


def test_building_validation_and_generation_fall_back_only_as_listed():
    cfg = RunConfig.model_validate(sameness.BASE)
    with Fallbacks() as audit:
        engine = sameness.build_engine(cfg, "npu")
        step = StepPlan.from_config(cfg).step(0)
        engine.evaluate(micro_batches(step, sameness.Documents(), rank=0, ranks=1))
        (model,) = engine.stages.parts.values()
        decoder = Decoder(CachedRunner(model, slots=2, capacity=24))
        rows = [decoder.add([1, 2, 3], Sampling(max_new=4, top_p=0.9)), decoder.add([4, 5], Sampling(max_new=4, temperature=0))]
        while decoder.step():
            pass
    assert all(len(row.tokens) > 5 for row in rows) and audit.seen["aten::matmul"] > 20, audit.seen
    assert set(audit.found) == listed()


def test_an_op_without_a_kernel_is_found():
    with Fallbacks() as audit:
        torch.nonzero_static(torch.ones(3, device="npu"), size=2)
    assert set(audit.found) == {"aten::nonzero_static"}


def listed() -> set[str]:
    """Ops of the page's list of fallbacks."""
    section = PAGE.read_text().partition("## Ops that fall back to the CPU")[2].partition("\n## ")[0]
    return set(re.findall(r"^- `(aten::[\w.]+)`", section, re.MULTILINE))
