"""Kernels with a fault in them, for tests of `llmtrain compare`."""

import torch

from llmtrain.ops.activation import swiglu_reference
from llmtrain.ops.attention import attention_reference
from llmtrain.ops.norm import rms_norm_reference
from llmtrain.ops.rope import rope_reference


class Fault:
    """Counts an op's calls; `when(call)` says in which of them the fault is there, counted from 0 in each run."""

    def __init__(self, when=lambda call: True):
        self.when, self.calls = when, 0

    def __call__(self) -> bool:
        self.calls += 1
        return self.when(self.calls - 1)


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 1.01


def wrong_scale(fault, by=1.02):
    def attention(q, k, v, *, mask, scale=None, **more):
        scale = q.shape[-1] ** -0.5 * (by if fault() else 1.0)
        return attention_reference(q, k, v, mask=mask, scale=scale, **more)

    return attention


def swapped_sign(fault):
    return lambda x, cos, sin: rope_reference(x, cos, -sin if fault() else sin)


def rounded_norm(fault):
    def norm(x, weight, eps):
        out = rms_norm_reference(x, weight, eps)
        return out.bfloat16().to(out.dtype) if fault() else out

    return norm


def wrong_gradient(fault):
    def swiglu(gate, up):
        return swiglu_reference(WrongGradient.apply(gate) if fault() else gate, up)

    return swiglu


def not_a_number(fault):
    def swiglu(gate, up):
        out = swiglu_reference(gate, up)
        if fault():
            out = out.index_put((torch.tensor(1), torch.tensor(7), torch.tensor(5)), torch.tensor(float("nan"), dtype=out.dtype))
        return out

    return swiglu
