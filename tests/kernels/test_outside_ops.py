"""Ops of liger-kernel, apex and Transformer Engine: what we ask of them is what the formula says, on stand-ins with their signatures. Not
run on hardware."""

import importlib
import importlib.util
import inspect
import os
import sys
from dataclasses import replace
from types import SimpleNamespace

import apex_package
import liger_package
import pytest
import te_package
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmtrain.config.train import OptimConfig
from llmtrain.engine.local_optimizer import LocalOptimizer
from llmtrain.ops import Call, choose, implementations
from llmtrain.ops.adamw import adamw_loop
from llmtrain.ops.apex import adamw_apex, layer_norm_apex, rms_norm_apex
from llmtrain.ops.liger import cross_entropy_liger, rms_norm_liger, rope_liger, swiglu_liger
from llmtrain.ops.norm import layer_norm_reference
from llmtrain.ops.transformer_engine import adamw_te, layer_norm_te, rms_norm_te

BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
"""In units of the largest number: about two roundings of the dtype, as the stand-ins compute in float64."""

DTYPES = st.sampled_from(list(BOUNDS))
DRAWN = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
REAL = importlib.util.find_spec("liger_kernel") is not None and os.environ.get("TRITON_INTERPRET") == "1"
needs_liger = pytest.mark.skipif(not REAL, reason="the package liger-kernel and Triton's interpreter are not here (make test-kernels)")


@pytest.fixture
def stand_ins(monkeypatch):
    for name, module in (liger_package.MODULES | apex_package.MODULES | te_package.MODULES).items():
        monkeypatch.setitem(sys.modules, name, module)


def rms_norm(x, weight):
    return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight


def rope(x, cos, sin):
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def check(ours, formula, tensors, wanted, *, times=1):
    """Output and gradients twice, of the first `wanted` tensors, within so many times the bound.

    Neither they nor the gradient that comes in may be written to.
    """
    narrow = [x.detach().clone().requires_grad_(i < wanted) for i, x in enumerate(tensors)]
    wide = [x.detach().double().requires_grad_(i < wanted) for i, x in enumerate(tensors)]
    out, expected = ours(*narrow), formula(*wide)
    # As models have them: [B,S,..] in memory.
    grad = torch.randn_like(out.transpose(0, -2).contiguous()).transpose(0, -2) if out.dim() else torch.tensor(1.7, dtype=out.dtype)
    kept = [grad.clone(), *(x.detach().clone() for x in narrow)]
    want = [expected, *torch.autograd.grad(expected, wide[:wanted], grad.double())]
    for again in (True, False):
        got = [out, *torch.autograd.grad(out, narrow[:wanted], grad, retain_graph=again)]
        assert all(torch.equal(a, b) for a, b in zip(kept, [grad, *narrow]))
        for a, b, like in zip(got, want, [None, *narrow]):
            assert like is None or a.dtype == like.dtype
            error = (a.double() - b).abs().max() / b.abs().max().clamp(min=1.0)
            assert error <= times * BOUNDS[a.dtype], error


@DRAWN
@given(rows=st.integers(1, 5), width=st.integers(1, 30), dtype=DTYPES, seed=st.integers(0, 99))
@pytest.mark.parametrize("ours", [rms_norm_liger, rms_norm_apex, rms_norm_te])
def test_rms_norm(stand_ins, ours, rows, width, dtype, seed):
    torch.manual_seed(seed)
    weight = torch.randn(width).to(dtype)
    check(lambda x, w: ours(x, w, 1e-6), rms_norm, [torch.randn(rows, 2, width).to(dtype), weight], 2)


@DRAWN
@given(rows=st.integers(1, 5), width=st.integers(2, 30), biased=st.booleans(), dtype=DTYPES, seed=st.integers(0, 99))
@pytest.mark.parametrize("ours", [layer_norm_apex, layer_norm_te])
def test_layer_norm(stand_ins, ours, rows, width, biased, dtype, seed):
    torch.manual_seed(seed)
    tensors = [torch.randn(2, rows, width).to(dtype).transpose(0, 1), *torch.randn(1 + biased, width).to(dtype)]
    calls = [lambda x, w, b=None, f=f: f(x, w, b, 1e-3) for f in (ours, layer_norm_reference)]
    check(*calls, tensors, len(tensors), times=2)  # a mean of few numbers is taken away, which leaves less of them


@pytest.mark.parametrize(("ours", "bound"), [(rms_norm_liger, 4e-3), (rms_norm_apex, 8e-3), (rms_norm_te, 8e-3)])
def test_an_fp32_weight_beside_bf16(stand_ins, ours, bound):
    x, weight = torch.randn(7, 64).bfloat16(), torch.randn(64, requires_grad=True)
    out = ours(x, weight, 1e-6)
    (grad,) = torch.autograd.grad(out, weight, torch.ones_like(out))
    want = rms_norm(x.double(), weight.detach().double())
    assert out.dtype == torch.bfloat16 and grad.dtype == torch.float32
    assert ((out - want).abs() <= bound * want.abs()).all()  # one rounding, and but for liger another of the weight


def rope_tensors(rows, shared, length, half, dtype, strided):
    x = torch.randn(rows, length, 3, 2 * half).to(dtype).transpose(1, 2)
    angles = (torch.rand(1 if shared else rows, 1, length, half) * 6).repeat(1, 1, 1, 2)
    return [x if strided else x.contiguous(), angles.cos(), angles.sin()]


ROPE = {"rows": st.integers(1, 3), "shared": st.booleans(), "length": st.integers(1, 9), "half": st.integers(1, 9), "dtype": DTYPES}


@DRAWN
@given(**ROPE, strided=st.booleans())
def test_rope(stand_ins, rows, shared, length, half, dtype, strided):
    check(rope_liger, rope, rope_tensors(rows, shared, length, half, dtype, strided), 1)


@DRAWN
@given(rows=st.integers(1, 4), width=st.integers(1, 30), dtype=DTYPES)
def test_swiglu(stand_ins, rows, width, dtype):
    check(swiglu_liger, lambda gate, up: F.silu(gate) * up, [torch.randn(rows, 2, width).to(dtype) for _ in range(2)], 2)


def cross_entropy_call(targets):
    return (
        lambda hidden, weight: cross_entropy_liger(hidden, weight, targets, chunk=3),
        lambda hidden, weight: F.cross_entropy(hidden @ weight.T, targets, ignore_index=-100, reduction="sum"),
    )


def head(rows, dtype):
    torch.manual_seed(rows)
    return [torch.randn(rows, 6).to(dtype), torch.randn(13, 6).to(dtype)]


TARGETS = st.lists(st.integers(0, 12) | st.just(-100), min_size=1, max_size=40)


@DRAWN
@given(targets=TARGETS, dtype=DTYPES)
def test_cross_entropy(stand_ins, targets, dtype):
    ours, formula = cross_entropy_call(torch.tensor(targets))
    check(ours, formula, head(len(targets), dtype), 2, times=4)  # its logits are rounded before they are summed


@pytest.mark.parametrize("frozen", [0, 1])
def test_cross_entropy_with_one_gradient(stand_ins, frozen):
    """The package makes no gradient of the weight unless the hidden states want one."""
    ours, formula = cross_entropy_call(torch.tensor([3, -100, 5]))
    tensors = head(3, torch.float32)
    tensors[1 - frozen].requires_grad_()
    ours(*tensors).backward()
    (want,) = torch.autograd.grad(formula(*tensors), tensors[1 - frozen])
    torch.testing.assert_close(tensors[1 - frozen].grad, want)
    assert tensors[frozen].grad is None


def test_cross_entropy_without_gradients_and_with_an_fp32_weight(stand_ins):
    ours, formula = cross_entropy_call(torch.tensor([3, -100, 5]))
    hidden, weight = torch.randn(3, 6).bfloat16(), torch.randn(13, 6, requires_grad=True)
    with torch.no_grad():
        loss = ours(hidden, weight)
    assert not loss.requires_grad and loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), formula(hidden.double(), weight.detach().bfloat16().double()))
    assert torch.autograd.grad(ours(hidden, weight), weight)[0].dtype == torch.float32


def trained(adamw, *, steps_before):
    """Parameters after four steps, begun with moments that have seen some steps, as a resumed run has them; set anew in between."""
    torch.manual_seed(0)
    parameters = {name: torch.nn.Parameter(torch.randn(5, 3)) for name in ("blocks.0.a.weight", "blocks.0.norm.weight", "head.weight")}
    cfg = OptimConfig(lr=0.1, weight_decay=0.1, no_decay=["*norm*"])
    optimizer = LocalOptimizer(parameters, cfg, ops=SimpleNamespace(adamw=adamw))
    for first, second in optimizer.moments.values():
        first.copy_(torch.randn(5, 3)), second.copy_(torch.rand(5, 3))
    optimizer.set_steps(steps_before)
    for step in range(4):
        for parameter in parameters.values():
            parameter.grad = torch.randn(5, 3)
        optimizer.step(lr=0.1 / (step + 1))
        if step == 1:
            optimizer.set_steps(steps_before + 9)
    return torch.stack([parameter.detach() for parameter in parameters.values()])


@pytest.mark.parametrize("fused", [adamw_apex, adamw_te])
@pytest.mark.parametrize("steps_before", [0, 7])
def test_fused_adam_is_adamw_from_any_step(stand_ins, fused, steps_before):
    got, want = (trained(adamw, steps_before=steps_before) for adamw in (fused, adamw_loop))
    torch.testing.assert_close(got, want, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("fused", [adamw_apex, adamw_te])
def test_fused_adam_alone_has_one_count_for_a_group(stand_ins, fused):
    """Without a state from elsewhere; a parameter whose gradients begin late is corrected as the others are."""
    late, first = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3))
    adamw = fused([{"params": [late, first], "weight_decay": 0.0}], lr=0.1, betas=(0.9, 0.99), eps=1e-8)
    adamw.step()
    for step in range(3):
        first.grad, late.grad = torch.ones(3), torch.ones(3) if step == 2 else None
        adamw.step()
    torch.testing.assert_close(first.detach(), torch.full((3,), 0.7))
    assert [float(adamw.state[p]["step"]) for p in (late, first)] == [3.0, 3.0]


@needs_liger
@pytest.mark.parametrize("module", liger_package.MODULES)
def test_the_recorded_signatures_are_ligers_own(module):
    for name, recorded in vars(liger_package.MODULES[module]).items():
        pair = (recorded, getattr(importlib.import_module(module), name))
        ours, own = (inspect.signature(inspect.unwrap(f.forward) if inspect.isclass(f) else f) for f in pair)
        assert [(p.name, p.kind, p.default) for p in ours.parameters.values()] == [
            (p.name, p.kind, p.default) for p in own.parameters.values()
        ]


@needs_liger
@settings(DRAWN, max_examples=5)
@given(**ROPE, strided=st.booleans())
def test_ligers_own_rope(rows, shared, length, half, dtype, strided):
    """In the interpreter, which does not run its RMSNorm and SwiGLU: they convert arguments that it keeps as numbers of Python."""
    check(rope_liger, rope, rope_tensors(rows, shared, length, half, dtype, strided), 1)


@needs_liger
@settings(DRAWN, max_examples=5)
@given(targets=TARGETS)
def test_ligers_own_cross_entropy(targets):
    ours, formula = cross_entropy_call(torch.tensor(targets))
    check(ours, formula, head(len(targets), torch.float32), 2)


ENTRIES = [
    ("rms_norm", "liger"),
    ("rope", "liger"),
    ("swiglu", "liger"),
    ("cross_entropy", "liger"),
    ("rms_norm", "apex"),
    ("layer_norm", "apex"),
    ("adamw", "apex"),
    ("rms_norm", "transformer_engine"),
    ("layer_norm", "transformer_engine"),
    ("adamw", "transformer_engine"),
]
GPU = Call(device="cuda", dtype=torch.float32, capability=(9, 0))


def entry_named(op, name):
    return next(entry for entry in implementations(op) if entry.name == name)


@pytest.mark.parametrize(("op", "name"), ENTRIES)
def test_they_serve_cuda_alone_and_only_when_named(op, name, monkeypatch):
    entry = replace(entry_named(op, name), probe=lambda: None)
    assert entry.refusal(GPU) is None and choose(op, GPU).name != name and entry.speed < 0
    assert entry.refusal(replace(GPU, device="cpu")) == "runs on cuda, not on cpu"
    assert "not float64" in entry.refusal(replace(GPU, dtype=torch.float64))
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    said = {"liger": "pip install liger-kernel", "apex": "NVIDIA's apex", "transformer_engine": "'transformer_engine[pytorch]'"}
    assert said[name] in entry_named(op, name).probe.__wrapped__()


def test_the_wrong_apex_is_refused_and_one_without_its_extensions(tmp_path, monkeypatch):
    probe = entry_named("adamw", "apex").probe.__wrapped__
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex/__init__.py").write_text("raise RuntimeError('a probe imports nothing')")
    info = tmp_path / "apex-0.9.10.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: apex\nVersion: 0.9.10\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert probe() == "this apex is not NVIDIA's: apex 0.9.10 of the package index is a web toolkit"
    assert "this apex is not NVIDIA's" in replace(entry_named("adamw", "apex"), probe=probe).refusal(GPU)
    (tmp_path / "apex/optimizers").mkdir()
    importlib.invalidate_caches()
    assert probe() == "needs apex built with its CUDA extensions: there is no amp_C"
    (tmp_path / "amp_C.py").write_text("")
    importlib.invalidate_caches()
    assert probe() is None


def test_transformer_engine_without_its_part_for_torch_is_refused(tmp_path, monkeypatch):
    probe = entry_named("rms_norm", "transformer_engine").probe.__wrapped__
    (tmp_path / "transformer_engine").mkdir()
    (tmp_path / "transformer_engine/__init__.py").write_text("raise RuntimeError('a probe imports nothing')")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert probe().startswith("needs transformer_engine with its part for torch")
    (tmp_path / "transformer_engine_torch-2.20.2.dist-info").mkdir()
    (tmp_path / "transformer_engine_torch-2.20.2.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: t\nVersion: 2.20.2\n")
    assert probe() is None, "the wheel has it in a folder of transformer_engine"
