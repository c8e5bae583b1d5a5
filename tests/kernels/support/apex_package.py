"""Stand-ins for NVIDIA's apex on the CPU: its signatures, what its kernels compute, and where FusedAdam counts its steps."""

import math
from types import SimpleNamespace

import torch


class FusedRMSNormAffineFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, weight, normalized_shape, eps, memory_efficient=False):
        assert weight.dtype == input.dtype and tuple(normalized_shape) == weight.shape and not memory_efficient
        ctx.save_for_backward(input, weight)
        ctx.eps = eps
        wide = input.double()
        return (wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.double()).to(input.dtype)

    @staticmethod
    def backward(ctx, grad_output):
        input, weight = ctx.saved_tensors
        wide, grad = input.double(), grad_output.double()
        scale = (wide.square().mean(-1, keepdim=True) + ctx.eps).rsqrt()
        slope = grad * weight.double()
        grad_input = scale * (slope - wide * scale.square() * (slope * wide).mean(-1, keepdim=True))
        grad_weight = (grad * wide * scale).flatten(0, -2).sum(0)
        return grad_input.to(input.dtype), grad_weight.to(weight.dtype), None, None, None


class FusedLayerNormAffineFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, weight, bias, normalized_shape, eps, memory_efficient=False):
        assert weight.dtype == bias.dtype == input.dtype and tuple(normalized_shape) == weight.shape and not memory_efficient
        ctx.save_for_backward(input, weight)
        ctx.eps = eps
        wide = input.double()
        return torch.nn.functional.layer_norm(wide, weight.shape, weight.double(), bias.double(), eps).to(input.dtype)

    @staticmethod
    def backward(ctx, grad_output):
        input, weight = ctx.saved_tensors
        centred, grad = input.double() - input.double().mean(-1, keepdim=True), grad_output.double()
        scale = (centred.square().mean(-1, keepdim=True) + ctx.eps).rsqrt()
        slope = grad * weight.double()
        grad_input = scale * (slope - slope.mean(-1, keepdim=True) - centred * scale.square() * (slope * centred).mean(-1, keepdim=True))
        grad_weight, grad_bias = ((grad * factor).flatten(0, -2).sum(0).to(weight.dtype) for factor in (centred * scale, 1.0))
        return grad_input.to(input.dtype), grad_weight, grad_bias, None, None, None


class FusedAdam(torch.optim.Optimizer):
    def __init__(
        self,
        params,
        lr=1e-3,
        bias_correction=True,
        betas=(0.9, 0.999),
        eps=1e-8,
        adam_w_mode=True,
        weight_decay=0.0,
        amsgrad=False,
        set_grad_none=True,
        capturable=False,
        master_weights=False,
    ):
        assert not (amsgrad or capturable or master_weights)
        defaults = {"lr": lr, "bias_correction": bias_correction, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)
        self.adam_w_mode = adam_w_mode

    @torch.no_grad()
    def step(self, closure=None, grads=None, output_params=None, scale=None, grad_norms=None, grad_scaler=None):
        self.advance()

    def advance(self):
        """Apart from `step`, around which torch calls hooks, once for every class that has one."""
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if len(state) == 0:
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
                self.update(p, state, group)

    def update(self, p, state, group):
        """One parameter, in fp32."""
        (b1, b2), decay = group["betas"], group["weight_decay"]
        grad = p.grad if self.adam_w_mode else p.grad + decay * p
        state["exp_avg"].mul_(b1).add_(grad, alpha=1 - b1)
        state["exp_avg_sq"].mul_(b2).addcmul_(grad, grad, value=1 - b2)
        first, second = (1 - b ** group["step"] if group["bias_correction"] else 1.0 for b in (b1, b2))
        update = state["exp_avg"] / first / (state["exp_avg_sq"].sqrt() / math.sqrt(second) + group["eps"])
        p.sub_(group["lr"] * (update + (decay * p if self.adam_w_mode else 0.0)))


MODULES = {
    "apex.normalization.fused_layer_norm": SimpleNamespace(
        FusedRMSNormAffineFunction=FusedRMSNormAffineFunction, FusedLayerNormAffineFunction=FusedLayerNormAffineFunction
    ),
    "apex.optimizers": SimpleNamespace(FusedAdam=FusedAdam),
}
