"""Any attention of the contract against the formula in float64: output, log-sum-exp, gradients, and every bit of the mask.

A test of a kernel draws calls and checks them:

    @settings(max_examples=40, deadline=None)
    @given(call=calls(Matrix(tile=16, longest=70)))
    def test_my_kernel(call):
        check(my_attention, call, dtype=torch.float32)

`my_attention(q, k, v, *, mask, scale=None, q_offset=0, kv_offset=0, return_lse=False)` is what docs/interfaces.md says.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from attention_call import AttentionCall
from attention_formula import formula, seen
from torch import Tensor

Attention = Callable[..., Tensor | tuple[Tensor, Tensor]]

BOUNDS = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 8e-3, torch.bfloat16: 3e-2}
"""Largest error of a tensor, as `error` measures it, for kernels that multiply in the dtype of the inputs and sum in fp32 or fp64.

Of the narrow ones 8 units of their last place: terms of a gradient, each rounded, cancel."""


class Values(NamedTuple):
    """What a call gives: output, log-sum-exp (None if not asked for), gradients of q, k and v (None if not asked for)."""

    out: Tensor
    lse: Tensor | None
    dq: Tensor | None = None
    dk: Tensor | None = None
    dv: Tensor | None = None


def check(
    attention: Attention,
    call: AttentionCall,
    *,
    dtype: torch.dtype,
    device: str = "cpu",
    backward: bool = True,
    bounds: Mapping[str, float] | float | None = None,
) -> dict[str, float]:
    """Raise AssertionError unless every value of the call is within its bound of the formula on the same, rounded inputs.

    bounds: one for all, or by name (out, lse, dq, dk, dv); those of BOUNDS by default. Returns the errors by name.
    """
    tensors, grads = inputs(call, dtype=dtype, device=device)
    got = run(attention, call, tensors, grads, backward=backward)
    want = run(formula, call, [x.double() for x in tensors], [x.double() for x in grads], backward=backward)
    assert got.out.dtype == dtype and got.out.shape == want.out.shape
    errors = {name: error(getattr(got, name), getattr(want, name)) for name in Values._fields if getattr(got, name) is not None}
    for name, found in errors.items():
        bound = bounds.get(name, BOUNDS[dtype]) if isinstance(bounds, Mapping) else bounds or BOUNDS[dtype]
        assert found <= bound, f"{name}: error {found:.2e} above {bound:.0e}; all errors {errors}; {call}"
    return errors


def error(got: Tensor, want: Tensor) -> float:
    """The largest difference, relative to the largest number of `want`, or to 1/4 if that is larger; infinite unless infinities agree.

    Inputs have a standard deviation of 1, and gradients that are 0 by the formula come out as what is left of terms of that size.
    """
    finite = want.isfinite()
    if got.shape != want.shape or not torch.equal(finite, got.isfinite()) or not torch.equal(got.double()[~finite], want[~finite]):
        return float("inf")
    difference, largest = ((x[finite].abs().max().item() if finite.any() else 0.0) for x in (got.double() - want, want))
    return difference / max(largest, 0.25)


def inputs(call: AttentionCall, *, dtype: torch.dtype, device: str = "cpu") -> tuple[list[Tensor], list[Tensor]]:
    """q, k, v with gradients on, and the gradients of out and lse; drawn from `call.seed`."""
    generator = torch.Generator().manual_seed(call.seed)

    def normal(heads: int, length: int, width: int) -> Tensor:
        """[rows, heads, length, width], in memory as the call's layout says: models hand over views of [B,S,H,d]."""
        x = torch.randn(call.rows, length, heads, width, generator=generator, dtype=torch.float64).to(device, dtype)
        return x.transpose(1, 2) if call.strided else x.transpose(1, 2).contiguous()

    tensors = [
        normal(call.heads, call.queries, call.d),
        normal(call.kv_heads, call.keys, call.d),
        normal(call.kv_heads, call.keys, call.dv),
    ]
    grad_out = normal(call.heads, call.queries, call.dv)
    grad_lse = torch.randn(call.rows, call.heads, call.queries, generator=generator, dtype=torch.float64)
    high = torch.promote_types(dtype, torch.float32)
    return [x.requires_grad_() for x in tensors], [grad_out, grad_lse.to(device, high)]


def run(attention: Attention, call: AttentionCall, tensors: list[Tensor], grads: list[Tensor], *, backward: bool = True) -> Values:
    """The values of one call."""
    tensors = [x.detach().requires_grad_(backward) for x in tensors]
    given = attention(*tensors, return_lse=call.lse, **call.options())
    outputs = given if call.lse else (given,)
    lse = outputs[1] if call.lse else None
    if not backward:
        return Values(outputs[0], lse)
    found = gradients(outputs, tensors, grads[: len(outputs)])
    return Values(outputs[0].detach(), None if lse is None else lse.detach(), *found)


def gradients(outputs: tuple[Tensor, ...], tensors: list[Tensor], grads: list[Tensor]) -> tuple[Tensor, ...]:
    """Zeros for what does not follow from the tensors: an output of queries that see no key may be a constant."""
    if not any(output.requires_grad for output in outputs):
        return tuple(torch.zeros_like(x) for x in tensors)
    return torch.autograd.grad(outputs, tensors, grads, allow_unused=True, materialize_grads=True)


def check_mask(
    attention: Attention, call: AttentionCall, *, dtype: torch.dtype = torch.float32, device: str = "cpu", backward: bool = True
):
    """Raise AssertionError unless exactly the pairs of the mask take part, in the forward and in the backward pass.

    With q and k zero all keys seen weigh the same, so that a value of 1 at one key, or a gradient of 1 at one query, shows who sees whom.
    This finds one wrong bit in any dtype, where an error of the output would drown in rounding.
    """
    want = seen(call.mask, rows=call.rows, queries=call.query_range, keys=call.key_range)
    forward = shown_by_values(attention, call, dtype=dtype, device=device)
    assert torch.equal(forward, want), f"forward: {_differences(forward, want)}; {call}"
    if backward:
        got = shown_by_gradients(attention, call, dtype=dtype, device=device)
        assert torch.equal(got, want), f"backward: {_differences(got, want)}; {call}"


def shown_by_values(attention: Attention, call: AttentionCall, *, dtype: torch.dtype, device: str) -> Tensor:
    """Booleans [B,S,T] that the forward pass shows."""
    q, k = _zeros(call, dtype, device)
    parts = []
    for first in range(0, call.keys, call.dv):
        count = min(call.dv, call.keys - first)
        v = torch.zeros(call.rows, call.kv_heads, call.keys, call.dv, dtype=dtype, device=device)
        v[:, :, first : first + count, :count] = torch.eye(count, dtype=dtype, device=device)
        with torch.no_grad():
            parts.append(_agreed(attention(q, k, v, **call.options())[..., :count] > 0))
    return torch.cat(parts, -1)


def shown_by_gradients(attention: Attention, call: AttentionCall, *, dtype: torch.dtype, device: str) -> Tensor:
    """Booleans [B,S,T] that the gradient of v shows."""
    q, k = _zeros(call, dtype, device)
    parts = []
    for first in range(0, call.queries, call.dv):
        count = min(call.dv, call.queries - first)
        v = torch.zeros(call.rows, call.kv_heads, call.keys, call.dv, dtype=dtype, device=device, requires_grad=True)
        grad = torch.zeros(call.rows, call.heads, call.queries, call.dv, dtype=dtype, device=device)
        grad[:, :, first : first + count, :count] = torch.eye(count, dtype=dtype, device=device)
        (found,) = gradients((attention(q, k, v, **call.options()),), [v], [grad])
        parts.append(_agreed(found[..., :count] > 0).transpose(1, 2))
    return torch.cat(parts, 1)


def _zeros(call: AttentionCall, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    sizes = ((call.heads, call.queries), (call.kv_heads, call.keys))
    return tuple(torch.zeros(call.rows, heads, length, call.d, dtype=dtype, device=device) for heads, length in sizes)


def _agreed(shown: Tensor) -> Tensor:
    """[B,heads,..] -> [B,..] on the CPU: every head has to show the same."""
    assert (shown == shown[:, :1]).all(), "heads differ in what they see"
    return shown[:, 0].cpu()


def _differences(got: Tensor, want: Tensor) -> str:
    places = (got != want).nonzero().tolist()
    return f"{len(places)} pairs differ, first (row, query, key) {places[:3]}"
