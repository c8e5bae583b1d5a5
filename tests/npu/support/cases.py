"""One Case or more per wrapper in llmtrain/ops/npu."""

from functools import partial

import attention_cases
import formulas
import torch
from case import Case, Inputs, randn

from llmtrain.ops.npu.cross_entropy import cross_entropy_npu
from llmtrain.ops.npu.experts import gating_top_k_softmax, grouped_mm_npu, permute_npu, unpermute_npu
from llmtrain.ops.npu.norm import add_rms_norm_npu, rms_norm_npu
from llmtrain.ops.npu.pointwise import rope_npu, swiglu_npu


def norm_inputs(*names: str) -> Inputs:
    return {**{name: randn(2, 3, 16) for name in names}, "weight": randn(16)}


def rotation(rows: int) -> Inputs:
    return {"x": randn(2, 3, 5, 8), "cos": randn(rows, 1, 5, 8).clamp(-1, 1), "sin": randn(rows, 1, 5, 8).clamp(-1, 1)}


def loss_inputs() -> Inputs:
    return {"hidden": randn(7, 8), "weight": randn(11, 8), "targets": torch.tensor([1, 2, -100, 4, 10, 5, 0])}


def rows_by_expert(counts: list[int]) -> Inputs:
    return {"x": randn(sum(counts), 8), "weight": randn(len(counts), 8, 6), "counts": torch.tensor(counts)}


def sent() -> Inputs:
    return {"rows": randn(10, 8), "order": torch.tensor([8, 3, 1, 0, 9, 5, 7, 2, 6, 4]), "probs": torch.rand(5, 2, dtype=torch.float64)}


def added(x, residual, weight):
    return formulas.rms_norm(x + residual, weight, 1e-2), x + residual


CASES = [
    *attention_cases.CASES,
    Case("rms_norm", "", partial(norm_inputs, "x"), partial(rms_norm_npu, eps=1e-2), partial(formulas.rms_norm, eps=1e-2), ("x", "weight")),
    Case(
        "add_rms_norm", "", partial(norm_inputs, "x", "residual"), partial(add_rms_norm_npu, eps=1e-2), added, ("x", "residual", "weight")
    ),
    Case("rope", "", partial(rotation, 1), rope_npu, formulas.rope, ("x",), wide=("cos", "sin")),
    Case("rope", "rows", partial(rotation, 2), rope_npu, formulas.rope, ("x",), wide=("cos", "sin")),
    Case("swiglu", "", lambda: {"gate": randn(3, 8), "up": randn(3, 8)}, swiglu_npu, formulas.swiglu, ("gate", "up")),
    Case("cross_entropy", "", loss_inputs, partial(cross_entropy_npu, chunk=3), formulas.cross_entropy, ("hidden", "weight")),
    Case("grouped_mm", "", partial(rows_by_expert, [2, 0, 4]), grouped_mm_npu, formulas.grouped_mm, ("x", "weight")),
    Case(
        "permute",
        "",
        lambda: {"x": randn(5, 8), "ids": torch.tensor([[2, 0], [0, 3], [2, 3], [3, 0], [0, 2]])},
        partial(permute_npu, experts=4),
        partial(formulas.permute, experts=4),
        ("x",),
    ),
    Case("unpermute", "", sent, unpermute_npu, formulas.unpermute, ("rows", "probs"), wide=("probs",)),
    Case(
        "gating",
        "",
        lambda: {"logits": randn(5, 6)},
        partial(gating_top_k_softmax, k=2),
        partial(formulas.gating, k=2),
        called_by_models=False,
    ),
]
BY_NAME = {case.name: case for case in CASES}
WRAPPERS = tuple(dict.fromkeys(case.wrapper for case in CASES))
