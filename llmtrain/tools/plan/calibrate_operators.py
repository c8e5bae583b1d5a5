"""How fast this processor does what `simulate/work.py` lists: products, experts, attention, element-wise work, and next to nothing."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

from llmtrain.simulate.blocks import attention_flops

ROUNDS = 5
"""In which every operator has its turn, so that what disturbs the machine for a while meets one round of each."""
BATCH, HEADS, LENGTH, WIDTH = 4, 4, 512, 64
"""Of the attention that is measured."""
GATE = (1024, 768, 2048)
"""Rows, model width and inner width of the element-wise operators."""


class Operator(NamedTuple):
    """What is called, and how many FLOPs, bytes or calls one call counts for."""

    call: Callable[[], Any]
    amount: float


def rates(seconds: float) -> dict[str, float]:
    """FLOP/s of products; rates of attention and experts over these, and of attention's backward passes over their forward passes; bytes/s
    of element-wise work; seconds of a small operator. All ranks measure at once."""
    operators = {"float32": _products("float32"), "bfloat16": _products("bfloat16"), "grouped": _experts(), "bandwidth": _elementwise()}
    operators |= {"launch": _small(), **_attention()}
    each: dict[str, list[float]] = {name: [] for name in operators}
    for _ in range(ROUNDS):
        for name, one in operators.items():
            each[name].append(_seconds(one.call, seconds / ROUNDS) / one.amount)
    took = {name: sorted(times)[1] for name, times in each.items()}  # the best may be luck, and the others disturbed
    found = {name: 1 / took[name] for name in ("float32", "bfloat16", "bandwidth")} | {"launch": took["launch"]}
    found |= {name: took["float32"] / took[name] for name in ("grouped", "attention", "context")}
    for name in ("attention", "context"):
        found[f"{name}_backward"] = 2.5 * took[name] / max(took[f"{name}_both"] - took[name], 0.1 * took[name])
    return found


def _seconds(call: Callable[[], Any], least: float) -> float:
    """Of one call, on average over `least` seconds, after one that warms up; all ranks begin together."""
    import torch.distributed as dist

    call()
    if dist.is_initialized():
        dist.barrier()
    started, calls = time.perf_counter(), 0
    while (spent := time.perf_counter() - started) < least or not calls:
        call()
        calls += 1
    return spent / calls


def _products(name: str) -> Operator:
    """The three products of a layer and its backward pass, [1024,768] by [768,768], about what a small model's blocks have."""
    import torch

    dtype = getattr(torch, name)
    x, w, g = torch.randn(1024, 768, dtype=dtype), torch.randn(768, 768, dtype=dtype), torch.randn(1024, 768, dtype=dtype)
    return Operator(lambda: (torch.nn.functional.linear(x, w), g @ w, g.t() @ x), 3 * 2 * 1024 * 768 * 768)


def _experts() -> Operator:
    """The same for the few rows that come to each of eight experts."""
    import torch

    x, g, w = torch.randn(8, 192, 320), torch.randn(8, 192, 640), torch.randn(8, 640, 320)
    flops = 3 * 2 * 8 * 192 * 320 * 640
    return Operator(lambda: [(torch.nn.functional.linear(a, b), c @ b, c.t() @ a) for a, b, c in zip(x, w, g)], flops)


def _elementwise() -> Operator:
    """A norm, a gate and a sum, forward and backward, counted as `simulate/blocks.py` counts their bytes."""
    import torch
    import torch.nn.functional as F

    rows, hidden, inside = GATE
    x, gate, up = (torch.randn(rows, size, requires_grad=True) for size in (hidden, inside, inside))
    weight = torch.ones(hidden, requires_grad=True)

    def run():
        outs = (F.rms_norm(x, (hidden,), weight), F.silu(gate) * up, x + x.detach())
        torch.autograd.grad(outs, (x, gate, up, weight), outs)

    return Operator(run, 4 * rows * (hidden * (2 + 3 + 6) + inside * (3 + 5)))


def _small() -> Operator:
    """A layer that computes next to nothing."""
    import torch

    layer, x = torch.nn.Linear(8, 8), torch.randn(8, 8)
    return Operator(lambda: [layer(x) for _ in range(100)], 100)


def _attention() -> dict[str, Operator]:
    """Causal attention by the op that runs take on a processor, forward alone and with its backward pass, counted as `simulate/blocks.py`
    counts its FLOPs; and of a piece of a row that context parallelism leaves to a rank, which another kernel takes."""
    import torch
    from llmtrain_kernels.mask import Mask

    from llmtrain.ops.sdpa import attention_sdpa
    from llmtrain.ops.tiled_attention import attention_tiled

    q, k, v, grad = (torch.randn(BATCH, HEADS, LENGTH, WIDTH, requires_grad=True) for _ in range(4))
    first, last = LENGTH // 2, LENGTH * 3 // 4
    piece, piece_grad = (x.detach()[:, :, first:last].clone().requires_grad_() for x in (q, grad))
    keys, values = (x.detach()[:, :, :last].clone().requires_grad_() for x in (k, v))

    def whole():
        return attention_tiled(q, k, v, mask=Mask(causal=True))

    def part():
        return attention_sdpa(piece, keys, values, mask=Mask(causal=True), q_offset=first)

    flops = attention_flops(rows=BATCH * LENGTH, keys=(LENGTH + 1) / 2, heads=HEADS, width=2 * WIDTH)
    less = attention_flops(rows=BATCH * (last - first), keys=(first + last) / 2, heads=HEADS, width=2 * WIDTH)
    return {
        "attention": Operator(whole, flops),
        "attention_both": Operator(lambda: torch.autograd.grad(whole(), (q, k, v), grad), flops),
        "context": Operator(part, less),
        "context_both": Operator(lambda: torch.autograd.grad(part(), (piece, keys, values), piece_grad), less),
    }
