"""One Case or more per wrapper in llmtrain/ops/npu: inputs, the call, and the formula that judges it."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import formulas
import torch
from torch import Tensor

from llmtrain.ops import Mask
from llmtrain.ops.npu.attention import attention_npu
from llmtrain.ops.npu.attention_parts import attention_part_backward_npu, attention_part_npu
from llmtrain.ops.npu.cross_entropy import cross_entropy_npu
from llmtrain.ops.npu.experts import gating_top_k_softmax, grouped_mm_npu, permute_npu, unpermute_npu
from llmtrain.ops.npu.norm import add_rms_norm_npu, rms_norm_npu
from llmtrain.ops.npu.pointwise import rope_npu, swiglu_npu

ERRORS = {
    # Error over the largest number of the result. fp32: sums of some ten products in an order of their own. bf16 keeps 8 bits, so results
    # are off by 2^-9 when rounded, and gradients are made of results that were rounded once or twice before.
    torch.float32: 2e-6,
    torch.bfloat16: 2e-2,
}

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """`inputs()` gives CPU tensors, floating ones in float64. `call` takes them by name on a device, in the dtype of the check, and
    `formula` in float64: both give a tensor or a tuple. Gradients are checked for the inputs in `gradients`.
    """

    wrapper: str
    variant: str
    inputs: Callable[[], Inputs]
    call: Callable[..., Any]
    formula: Callable[..., Any]
    gradients: tuple[str, ...] = ()
    called_by_models: bool = True
    wide: tuple[str, ...] = ()
    """Inputs that stay in float32 whatever the dtype."""
    dtypes: tuple[torch.dtype, ...] = tuple(ERRORS)

    @property
    def name(self) -> str:
        return f"{self.wrapper}-{self.variant}" if self.variant else self.wrapper


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def qkv(*, rows: int = 2, heads: int = 4, groups: int = 2, queries: int = 7, keys: int = 7, d: int = 8, dv: int = 8) -> Inputs:
    return {"q": randn(rows, heads, queries, d), "k": randn(rows, groups, keys, d), "v": randn(rows, groups, keys, dv)}


def sees(mask: Mask, shift: int) -> Callable[[int, int, int], bool]:
    """By the definition of Mask; `shift` is the first query's place minus the first key's."""

    def visible(row: int, i: int, j: int) -> bool:
        place = i + shift
        if (mask.causal and j > place) or (mask.window is not None and j <= place - mask.window):
            return False
        if mask.documents is None:
            return True
        owner = [number for number, length in enumerate(mask.documents[row]) for _ in range(length)]
        return owner[place] == owner[j]

    return visible


def attention(variant: str, mask: Mask, *, q_offset: int = 0, kv_offset: int = 0, scale: float = 0.3, **shapes: int) -> Case:
    call = partial(attention_npu, mask=mask, scale=scale, q_offset=q_offset, kv_offset=kv_offset)
    see = sees(mask, q_offset - kv_offset)

    def formula(q, k, v):
        return formulas.attention(q, k, v, scale=scale, sees=see)[0]

    return Case("attention", variant, partial(qkv, **shapes), call, formula, ("q", "k", "v"))


def with_lse(variant: str, mask: Mask) -> Case:
    def call(**tensors):
        with torch.no_grad():
            return attention_npu(**tensors, mask=mask, return_lse=True)

    def formula(q, k, v):
        return formulas.attention(q, k, v, scale=formulas.default_scale(q), sees=sees(mask, 0))

    return Case("attention", variant, qkv, call, formula)


def part(variant: str, causal: bool, **shapes: int) -> Case:
    def formula(q, k, v):
        return formulas.attention(q, k, v, scale=0.3, sees=sees(Mask(causal=causal), 0))

    return Case("attention_part", variant, partial(qkv, **shapes), partial(attention_part_npu, causal=causal, scale=0.3), formula)


def part_backward(variant: str, causal: bool, **shapes: int) -> Case:
    """Gradients of one of two parts whose results are merged: the second has three keys that every query sees."""

    def merged(q, k, v, k2, v2):
        # Twice as wide, so that the second part has queries of its own, through which nothing flows back to q.
        own = sees(Mask(causal=causal), 0)
        both = torch.cat((torch.cat((k, 0 * k), 3), torch.cat((0 * k2, k2), 3)), 2), torch.cat((v, v2), 2)
        queries = torch.cat((q, q.detach()), 3)
        return formulas.attention(queries, *both, scale=0.3, sees=lambda b, i, j: j >= k.shape[2] or own(b, i, j))

    def inputs():
        tensors = qkv(**shapes)
        rows, groups, _, d = tensors["k"].shape
        other = {"k2": randn(rows, groups, 3, d), "v2": randn(rows, groups, 3, tensors["v"].shape[3])}
        out, lse = merged(**tensors, **other)
        return {"grad": torch.randn_like(out), **tensors, "out": out, "lse": lse, **other}

    def call(k2, v2, **tensors):
        return attention_part_backward_npu(**tensors, causal=causal, scale=0.3)

    def formula(grad, out, lse, k2, v2, **tensors):
        leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
        return torch.autograd.grad(merged(**leaves, k2=k2, v2=v2)[0], tuple(leaves.values()), grad)

    return Case("attention_part_backward", variant, inputs, call, formula, wide=("lse",))


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
    attention("causal", Mask()),
    attention("full", Mask(causal=False), keys=5),
    attention("window", Mask(window=3)),
    attention("documents", Mask(documents=((3, 4), (7,)))),
    attention("documents-window", Mask(documents=((3, 4), (1, 6)), window=2)),
    attention("documents-full", Mask(causal=False, documents=((3, 4), (1, 6)))),
    attention("cache", Mask(), q_offset=4, queries=3),
    attention("cache-window", Mask(window=3), q_offset=4, queries=3),
    attention("later-queries", Mask(), q_offset=2, queries=4),
    attention("narrow-v", Mask(), dv=4),
    attention("wide-v", Mask(), d=4, dv=8),
    with_lse("lse", Mask()),
    with_lse("documents-lse", Mask(documents=((3, 4), (1, 6)))),
    part("causal", True),
    part("full", False, keys=4),
    part_backward("causal", True, dv=4),
    part_backward("full", False, keys=4),
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
