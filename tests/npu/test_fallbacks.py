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
from torch._C import _dispatch_has_kernel_for_dispatch_key as has_kernel  # noqa: E402

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
    "DeepSeek": {"model": MODELS["DeepSeek"]},
    "DeepSeek, plain": {"model": MODELS["DeepSeek"], "kernels": PLAIN},
    "BigMac": {"model": MODELS["BigMac"]},
    "capacity": {"model": {"ffn": MODELS["MoE"]["ffn"] | {"capacity": {"factor": 1.0}}}},
    "GPT": {"model": MODELS["GPT"]},
    "MTP": {"model": MODELS["MTP"]},
    "recomputed": {"train": {"recompute": "selective"}},
}


@pytest.fixture(scope="module")
def composed() -> dict[str, dict[str, set[str]]]:
    """Test -> ops without a kernel for NPUs that torch makes of others -> those others."""
    return {}


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
def test_no_op_of_a_training_step_falls_back(name, composed):
    audit = one_step(STEPS[name])
    assert audit.seen["aten::_fused_adamw_"] >= 2 and audit.seen["aten::matmul"] + audit.seen["aten::mm"] > 20, audit.seen
    assert audit.found == {}
    composed[name] = audit.composed


def test_building_validation_and_generation_fall_back_only_as_listed(composed):
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
    assert set(audit.found) == set(listed("## Ops that fall back to the CPU"))
    composed["building"] = audit.composed


def test_ops_made_of_others_are_made_of_ops_with_kernels(composed):
    if len(composed) <= len(STEPS):
        pytest.skip("needs all tests above")
    found = {op: parts for ops in composed.values() for op, parts in ops.items()}
    assert found == listed("## Ops made of others")
    assert [part for parts in found.values() for part in parts if not has_kernel(part, "PrivateUse1")] == []


def test_an_op_without_a_kernel_is_found():
    with Fallbacks() as audit:
        torch.nonzero_static(torch.ones(3, device="npu"), size=2)
    assert set(audit.found) == {"aten::nonzero_static"}


def test_a_fallback_inside_an_op_made_of_others_is_found():
    library = torch.library.Library("aten", "FRAGMENT")
    library.define("llmtrain_composed(Tensor x) -> Tensor")
    library.impl("llmtrain_composed", lambda x: torch.nonzero_static(x, size=2), "CompositeExplicitAutograd")
    with Fallbacks() as audit:
        torch.ops.aten.llmtrain_composed(torch.ones(3, device="npu"))
    assert audit.composed == {"aten::llmtrain_composed": {"aten::nonzero_static"}}


def listed(title: str) -> dict[str, set[str]]:
    """Ops of the page's list under `title` -> the ops that stand behind them."""
    section = PAGE.read_text().partition(title)[2].partition("\n## ")[0]
    lines = re.findall(r"^- `(aten::[\w.]+)`(.*)$", section, re.MULTILINE)
    return {name: set(re.findall(r"`(aten::[\w.]+)`", rest)) for name, rest in lines}
