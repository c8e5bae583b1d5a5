"""Stand-ins for Transformer Engine 2.20.2 on the CPU: the signatures of its FusedAdam and of the functions of C++ that its norms call by
place, what their kernels compute, and what they keep."""

from types import SimpleNamespace

import apex_package
import torch

DTYPES = {torch.float32: "kFloat32", torch.float16: "kFloat16", torch.bfloat16: "kBFloat16"}


def _check(rows, weight, sm_margin, zero_centered_gamma, *, like=None):
    """Tensors as the kernels need them: rows, contiguous, of one dtype; numbers of C++'s types."""
    assert rows.dim() == 2 and rows.is_contiguous() and weight.shape == rows.shape[1:] and weight.dtype == rows.dtype
    assert like is None or (like.shape == rows.shape and like.dtype == rows.dtype and like.is_contiguous())
    assert type(sm_margin) is int and type(zero_centered_gamma) is bool and not zero_centered_gamma


def _output(ln_out, quantizer, otype, rows):
    assert ln_out is None and quantizer is None and otype == DTYPES[rows.dtype]


def rmsnorm_fwd(input, weight, eps, ln_out, quantizer, otype, sm_margin, zero_centered_gamma, /):
    _check(input, weight, sm_margin, zero_centered_gamma)
    _output(ln_out, quantizer, otype, input)
    wide = input.double()
    rsigma = (wide.square().mean(-1) + eps).rsqrt()
    return [(wide * rsigma[:, None] * weight.double()).to(input.dtype), None, rsigma.float()]


def rmsnorm_bwd(dz, x, rsigma, gamma, sm_margin, zero_centered_gamma, /):
    _check(x, gamma, sm_margin, zero_centered_gamma, like=dz)
    assert rsigma.dtype == torch.float32
    scale, slope = rsigma.double()[:, None], dz.double() * gamma.double()
    normed = x.double() * scale
    dx = scale * (slope - normed * (slope * normed).mean(-1, keepdim=True))
    return [dx.to(x.dtype), (dz.double() * normed).sum(0).to(gamma.dtype)]


def layernorm_fwd(input, weight, bias, eps, ln_out, quantizer, otype, sm_margin, zero_centered_gamma, /):
    _check(input, weight, sm_margin, zero_centered_gamma)
    _output(ln_out, quantizer, otype, input)
    assert bias.shape == weight.shape and bias.dtype == weight.dtype
    mu = input.double().mean(-1)
    centred = input.double() - mu[:, None]
    rsigma = (centred.square().mean(-1) + eps).rsqrt()
    out = centred * rsigma[:, None] * weight.double() + bias.double()
    return [out.to(input.dtype), mu.float(), rsigma.float()]


def layernorm_bwd(dz, x, mu, rsigma, gamma, sm_margin, zero_centered_gamma, /):
    _check(x, gamma, sm_margin, zero_centered_gamma, like=dz)
    assert mu.dtype == rsigma.dtype == torch.float32
    scale, slope = rsigma.double()[:, None], dz.double() * gamma.double()
    normed = (x.double() - mu.double()[:, None]) * scale
    dx = scale * (slope - slope.mean(-1, keepdim=True) - normed * (slope * normed).mean(-1, keepdim=True))
    return [dx.to(x.dtype), (dz.double() * normed).sum(0).to(gamma.dtype), dz.double().sum(0).to(gamma.dtype)]


class FusedAdam(apex_package.FusedAdam):
    """Of the same numbers as apex's; it makes a state of every parameter, with a gradient or without."""

    def __init__(
        self,
        params,
        lr=1e-3,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0.0,
        amsgrad=False,
        *,
        bias_correction=True,
        adam_w_mode=True,
        capturable=False,
        master_weights=False,
        master_weight_dtype=torch.float32,
        exp_avg_dtype=torch.float32,
        exp_avg_sq_dtype=torch.float32,
        use_decoupled_grad=False,
        store_param_remainders=False,
        set_grad_none=None,
    ):
        assert {master_weight_dtype, exp_avg_dtype, exp_avg_sq_dtype} == {torch.float32}
        assert not (amsgrad or capturable or master_weights or use_decoupled_grad or store_param_remainders) and set_grad_none is None
        super().__init__(params, lr, bias_correction, betas, eps, adam_w_mode, weight_decay)

    @torch.no_grad()
    def step(self, closure=None, grad_scaler=None):
        for p in (p for group in self.param_groups for p in group["params"]):
            if len(self.state[p]) == 0:
                self.state[p] = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        self.advance()


BINDING = (rmsnorm_fwd, rmsnorm_bwd, layernorm_fwd, layernorm_bwd)
MODULES = {
    "transformer_engine_torch": SimpleNamespace(**{function.__name__: function for function in BINDING}),
    "transformer_engine": SimpleNamespace(),
    "transformer_engine.pytorch": SimpleNamespace(),
    "transformer_engine.pytorch.constants": SimpleNamespace(TE_DType=DTYPES),
    "transformer_engine.pytorch.optimizers": SimpleNamespace(FusedAdam=FusedAdam),
}
