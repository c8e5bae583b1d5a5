"""Cases of attention: whole, in parts, and parts put together as the ring of context parallelism does."""

from collections.abc import Callable
from functools import partial
from typing import Any

import formulas
import torch
from case import Case, Inputs, randn
from torch import Tensor

from llmtrain.ops import Mask
from llmtrain.ops.npu.attention import attention_npu
from llmtrain.ops.npu.attention_parts import attention_part_backward_npu, attention_part_npu

PART, BACKWARD = "attention_part", "attention_part_backward"
LATENT = {"heads": 2, "groups": 2, "queries": 5, "keys": 5, "d": 192, "dv": 128}
"""Head sizes of multi-head latent attention (arXiv 2412.19437): 128 + 64 of rotary position for q and k, 128 for v."""


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


def attention(variant: str, mask: Mask, *, q_offset: int = 0, kv_offset: int = 0, scale: float | None = 0.3, **shapes: int) -> Case:
    call = partial(attention_npu, mask=mask, scale=scale, q_offset=q_offset, kv_offset=kv_offset)
    see = sees(mask, q_offset - kv_offset)

    def formula(q, k, v):
        return formulas.attention(q, k, v, scale=scale or formulas.default_scale(q), sees=see)[0]

    return Case("attention", variant, partial(qkv, **shapes), call, formula, ("q", "k", "v"))


def with_lse(variant: str, mask: Mask, **shapes: int) -> Case:
    def call(**tensors):
        with torch.no_grad():
            return attention_npu(**tensors, mask=mask, return_lse=True)

    def formula(q, k, v):
        return formulas.attention(q, k, v, scale=formulas.default_scale(q), sees=sees(mask, 0))

    return Case("attention", variant, partial(qkv, **shapes), call, formula)


def part(variant: str, causal: bool, *, scale: float = 0.3, **shapes: int) -> Case:
    def formula(q, k, v):
        return formulas.attention(q, k, v, scale=scale, sees=sees(Mask(causal=causal), 0))

    call = partial(attention_part_npu, causal=causal, scale=scale)
    return Case(PART, variant, partial(qkv, **shapes), call, formula, graph=f"{PART}-ring-{variant}")


def two_parts(**shapes: int) -> Inputs:
    """A part, and the keys and values of a second one: three, which every query sees."""
    tensors = qkv(**shapes)
    rows, groups, _, d = tensors["k"].shape
    return tensors | {"k2": randn(rows, groups, 3, d), "v2": randn(rows, groups, 3, tensors["v"].shape[3])}


def part_backward(variant: str, causal: bool, *, scale: float = 0.3, **shapes: int) -> Case:
    """Gradients of one of two parts whose results are merged."""

    def merged(q, k, v, k2, v2):
        # Twice as wide, so that the second part has queries of its own, through which nothing flows back to q.
        both = torch.cat((torch.cat((k, 0 * k), 3), torch.cat((0 * k2, k2), 3)), 2), torch.cat((v, v2), 2)
        return formulas.attention(torch.cat((q, q.detach()), 3), *both, scale=scale, sees=in_either(causal, k))

    def inputs():
        tensors = two_parts(**shapes)
        out, lse = merged(**tensors)
        return {"grad": torch.randn_like(out), **tensors, "out": out, "lse": lse}

    def call(k2, v2, **tensors):
        return attention_part_backward_npu(**tensors, causal=causal, scale=scale)

    def formula(grad, out, lse, k2, v2, **tensors):
        leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
        return torch.autograd.grad(merged(**leaves, k2=k2, v2=v2)[0], tuple(leaves.values()), grad)

    return Case(BACKWARD, variant, inputs, call, formula, wide=("lse",), graph=f"{PART}-ring-{variant}")


def in_either(causal: bool, k: Tensor) -> Callable[[int, int, int], bool]:
    """What a query sees of a part's keys `k`, which come first, and of those of another part."""
    own = sees(Mask(causal=causal), 0)
    return lambda row, i, j: j >= k.shape[2] or own(row, i, j)


def ring(variant: str, causal: bool, *, scale: float = 0.3, **shapes: int) -> Case:
    """Both wrappers as the ring calls them: the backward one gets what the forward one gave, merged over two parts."""

    def formula(q, k, v, k2, v2):
        return formulas.attention(q, torch.cat((k, k2), 2), torch.cat((v, v2), 2), scale=scale, sees=in_either(causal, k))[0]

    def call(q, k, v, k2, v2):
        return _TwoParts.apply(q, k, v, k2, v2, causal, scale)

    names = ("q", "k", "v", "k2", "v2")
    return Case(PART, f"ring-{variant}", partial(two_parts, **shapes), call, formula, names, also=(BACKWARD,))


class _TwoParts(torch.autograd.Function):
    """Attention to (k, v), causal or full, and to (k2, v2), full."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor, causal: bool, scale: float) -> Tensor:
        parts = [attention_part_npu(q, k, v, causal=causal, scale=scale), attention_part_npu(q, k2, v2, causal=False, scale=scale)]
        lse = torch.logaddexp(parts[0][1], parts[1][1])
        out = sum(own * torch.exp(own_lse - lse).unsqueeze(-1) for own, own_lse in parts).to(q.dtype)
        ctx.save_for_backward(q, k, v, k2, v2, out, lse)
        ctx.rest = causal, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        q, k, v, k2, v2, out, lse = ctx.saved_tensors
        causal, scale = ctx.rest
        first = attention_part_backward_npu(grad, q, k, v, out, lse, causal=causal, scale=scale)
        second = attention_part_backward_npu(grad, q, k2, v2, out, lse, causal=False, scale=scale)
        return first[0] + second[0], *first[1:], *second[1:], None, None


PARTS = {"causal": (True, {"dv": 4}), "full": (False, {"keys": 4}), "latent": (True, LATENT | {"scale": 192**-0.5})}

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
    attention("latent", Mask(), scale=None, **LATENT),
    attention("latent-documents", Mask(documents=((2, 3), (5,))), scale=None, **LATENT),
    attention("latent-cache", Mask(), scale=None, q_offset=3, **LATENT | {"queries": 2}),
    with_lse("lse", Mask()),
    with_lse("documents-lse", Mask(documents=((3, 4), (1, 6)))),
    with_lse("latent-lse", Mask(), **LATENT),
    *(part(name, causal, **shapes) for name, (causal, shapes) in PARTS.items()),
    *(part_backward(name, causal, **shapes) for name, (causal, shapes) in PARTS.items()),
    *(ring(name, causal, **shapes) for name, (causal, shapes) in PARTS.items()),
]
