"""Stand-ins for liger-kernel 0.8.5 on the CPU: its signatures, what its kernels compute, and where they write over what they were given.

Writes go through `.data`, since autograd does not see those of the package's kernels either.
"""

from types import SimpleNamespace

import torch
from torch import Tensor


class LigerRMSNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, X, W, eps, offset=0.0, casting_mode="llama", in_place=True, row_mode=None):
        X, W = X.contiguous(), W.contiguous()
        ctx.save_for_backward(X, W)
        ctx.eps, ctx.offset, ctx.in_place = eps, offset, in_place
        wide = X.double()
        normed = wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
        if casting_mode == "gemma":
            return (normed * (W.double() + offset)).to(X.dtype)
        return normed.to(X.dtype) * (W + offset).to(X.dtype)

    @staticmethod
    def backward(ctx, dY):
        X, W = ctx.saved_tensors
        dY, wide = dY.contiguous(), X.double()
        scale = (wide.square().mean(-1, keepdim=True) + ctx.eps).rsqrt()
        slope = dY.double() * (W.double() + ctx.offset)
        dX = scale * (slope - wide * scale.square() * (slope * wide).mean(-1, keepdim=True))
        dW = (dY.double() * wide * scale).flatten(0, -2).sum(0).to(W.dtype)
        result = dY if ctx.in_place else torch.empty_like(dY)
        result.data.copy_(dX)
        return result, dW, None, None, None, None, None


def turn(x: Tensor, cos: Tensor, sin: Tensor, rotary_dim: int | None) -> Tensor:
    """[B,heads,S,d], turned in place if it lies in memory as [B,S,heads,d]; of cos and sin only the left halves count."""
    assert rotary_dim is None and cos.dtype == sin.dtype
    x = x.transpose(1, 2).contiguous()
    half = x.shape[-1] // 2
    cos, sin = (a[:, :, None, :half].double() for a in (cos, sin))  # [B or 1,S,1,d/2]
    first, second = x[..., :half].double(), x[..., half:].double()
    x.data.copy_(torch.cat((first * cos - second * sin, second * cos + first * sin), -1))
    return x.transpose(1, 2)


class LigerRopeFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, cos, sin, position_ids=None, unsqueeze_dim=1, rotary_dim=None):
        cos, sin = (a.squeeze(unsqueeze_dim) if a.dim() == 4 else a for a in (cos, sin))
        ctx.save_for_backward(cos, sin)
        return turn(q, cos, sin, rotary_dim), turn(k, cos, sin, rotary_dim)

    @staticmethod
    def backward(ctx, dq, dk):
        cos, sin = ctx.saved_tensors
        return turn(dq, cos, -sin, None), turn(dk, cos, -sin, None), None, None, None, None, None


def swiglu_forward(a, b, gate_multiplier: float = 1.0):
    shape = a.shape
    a, b = (x.view(-1, shape[-1]) for x in (a, b))
    silu = a.double() * gate_multiplier
    return a, b, ((silu * silu.sigmoid()).to(b.dtype) * b).view(shape)


def swiglu_backward(a, b, dc, gate_multiplier: float = 1.0):
    shape = dc.shape
    dc = dc.view(-1, shape[-1])
    gate, up, slope = a.double() * gate_multiplier, b.double(), dc.double().view(a.shape)
    share = gate.sigmoid()
    a.data.copy_(slope * up * share * (1 + gate * (1 - share)) * gate_multiplier)
    b.data.copy_(slope * gate * share)
    return a.view(shape), b.view(shape)


class LigerFusedLinearCrossEntropyFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        _input,
        weight,
        target,
        bias=None,
        ce_weight=None,
        ignore_index=-100,
        lse_square_scale=0.0,
        label_smoothing=0.0,
        reduction="mean",
        softcap=None,
        return_z_loss: bool = False,
        accum_dtype=None,
        use_token_scaling: bool = False,
        return_token_accuracy: bool = False,
        return_predicted_tokens: bool = False,
        ce_impl=None,
        ce_mode=None,
        chunk_mem_const: int = 1,
    ):
        assert _input.dtype == weight.dtype and _input.dim() == 2 and bias is ce_weight is softcap is None
        kept, rows = target != ignore_index, torch.arange(len(target))
        log_probs = (_input.double() @ weight.double().T).log_softmax(1)
        losses = -log_probs[rows, target.clamp(min=0)] * kept
        slope = log_probs.exp()
        slope[rows, target.clamp(min=0)] -= 1
        slope = slope * kept[:, None] / (kept.sum() if reduction == "mean" else 1)
        grad_input = grad_weight = None
        if _input.requires_grad:
            grad_input = (slope @ weight.double()).to(_input.dtype)
            grad_weight = torch.zeros_like(weight, dtype=accum_dtype or weight.dtype) if weight.requires_grad else None
            for each, row in zip(slope, _input):  # chunks of one row
                if grad_weight is not None:
                    grad_weight += torch.outer(each, row.double()).to(_input.dtype)
        ctx.grads = grad_input, None if grad_weight is None else grad_weight.to(weight.dtype)
        return (losses.mean() if reduction == "mean" else losses.sum()).float(), None, None, None

    @staticmethod
    def backward(ctx, grad_output, *_):
        for grad in ctx.grads:
            if grad is not None:
                grad.data.mul_(grad_output.to(grad.dtype))
        return *ctx.grads, *(None,) * 16


MODULES = {
    "liger_kernel.ops.rms_norm": SimpleNamespace(LigerRMSNormFunction=LigerRMSNormFunction),
    "liger_kernel.ops.rope": SimpleNamespace(LigerRopeFunction=LigerRopeFunction),
    "liger_kernel.ops.swiglu": SimpleNamespace(swiglu_forward=swiglu_forward, swiglu_backward=swiglu_backward),
    "liger_kernel.ops.fused_linear_cross_entropy": SimpleNamespace(
        LigerFusedLinearCrossEntropyFunction=LigerFusedLinearCrossEntropyFunction
    ),
}
