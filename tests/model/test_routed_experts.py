"""The contract of routed experts, which every dispatcher and every fused implementation has to keep."""

import pytest
import torch
import torch.nn.functional as F

from llmtrain.model.experts import Dispatched, Dispatcher, Experts, LocalDispatcher, RoutedExperts
from llmtrain.ops import Call, resolve

E, D, WIDTH, K = 4, 8, 16, 2


@pytest.fixture
def ops():
    return resolve({}, Call(device="cpu", dtype=torch.float64))


def experts(ops, activation: str) -> Experts:
    torch.manual_seed(0)
    module = Experts(E, D, WIDTH, ops=ops, activation=activation).double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return module


def inputs(tokens: int):
    torch.manual_seed(1)
    x = torch.randn(tokens, D, dtype=torch.float64, requires_grad=True)
    probs = torch.rand(tokens, K, dtype=torch.float64, requires_grad=True)
    # Expert 3 gets nothing.
    ids = torch.stack([torch.randperm(E - 1)[:K] for _ in range(tokens)])
    return x, probs, ids


def token_by_token(module: Experts, x, probs, ids):
    out = []
    for token in range(len(x)):
        total = torch.zeros(D, dtype=x.dtype)
        for slot in range(K):
            e = int(ids[token, slot])
            up = x[token] @ module.up_proj[e]
            if module.gate_proj is None:
                inner = F.gelu(up, approximate="tanh")
            else:
                inner = F.silu(x[token] @ module.gate_proj[e]) * up
            total = total + probs[token, slot] * (inner @ module.down_proj[e])
        out.append(total)
    return torch.stack(out)


class LateDispatcher:
    """A dispatcher that does nothing before it is waited for, as one that communicates would; counts what it is asked."""

    def __init__(self, inner: LocalDispatcher):
        self.inner, self.calls = inner, []

    def start(self, x, probs, ids):
        self.calls.append("start")
        return x, probs, ids

    def wait(self, handle) -> Dispatched:
        self.calls.append("wait")
        return self.inner.wait(self.inner.start(*handle))

    def combine_start(self, rows, combine):
        self.calls.append("combine_start")
        return rows, combine

    def combine_wait(self, handle):
        self.calls.append("combine_wait")
        return self.inner.combine_wait(self.inner.combine_start(*handle))


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
@pytest.mark.parametrize("late", [False, True])
def test_equals_a_loop_over_tokens_forward_and_backward(ops, activation, late):
    module, (x, probs, ids) = experts(ops, activation), inputs(9)
    dispatcher = LocalDispatcher(E, ops)
    routed = RoutedExperts(module, LateDispatcher(dispatcher) if late else dispatcher)
    leaves = [x, probs, *module.parameters()]
    weigh = torch.randn(9, D, dtype=torch.float64)
    got, want = routed(x, probs, ids), token_by_token(module, x, probs, ids)
    torch.testing.assert_close(got, want)
    for mine, expected in zip(torch.autograd.grad(got, leaves, weigh), torch.autograd.grad(want, leaves, weigh)):
        torch.testing.assert_close(mine, expected)
    if late:
        assert routed.dispatcher.calls == ["start", "wait", "combine_start", "combine_wait"]


def test_two_micro_batches_may_be_in_flight(ops):
    module, dispatcher = experts(ops, "swiglu"), LocalDispatcher(E, ops)
    first, second = inputs(5), inputs(3)
    handles = [dispatcher.start(*first), dispatcher.start(*second)]
    arrived = [dispatcher.wait(handle) for handle in handles]
    back = [dispatcher.combine_start(module(a.rows, a.counts), a.combine) for a in reversed(arrived)]
    out = [dispatcher.combine_wait(handle) for handle in reversed(back)]
    for got, given in zip(out, (first, second)):
        torch.testing.assert_close(got, token_by_token(module, *given))


def test_a_dispatcher_moves_rows_of_any_width(ops):
    """BigMac dispatches narrow rows, projecting outside."""
    dispatcher = LocalDispatcher(E, ops)
    _, probs, ids = inputs(6)
    arrived = dispatcher.wait(dispatcher.start(torch.ones(6, 3, dtype=torch.float64), probs, ids))
    assert arrived.rows.shape == (12, 3) and arrived.counts.sum() == 12
    out = dispatcher.combine_wait(dispatcher.combine_start(arrived.rows[:, :1], arrived.combine))
    torch.testing.assert_close(out[:, 0], probs.sum(1))


def test_the_local_dispatcher_is_one(ops):
    assert isinstance(LocalDispatcher(E, ops), Dispatcher) and not isinstance(object(), Dispatcher)
