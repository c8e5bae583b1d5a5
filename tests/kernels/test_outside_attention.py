"""Attention of outside packages: what we ask of them is what the formula says, on stand-ins with their signatures. Not run on hardware."""

import importlib
import importlib.util
import inspect
import sys
from dataclasses import replace

import outside_packages
import pytest
import torch
from attention_call import AttentionCall
from attention_calls import Matrix, calls
from attention_harness import check, check_mask
from hypothesis import HealthCheck, given, settings
from llmtrain_kernels import Mask

from llmtrain.ops import Call, choose, flex_attention
from llmtrain.ops.flex_attention import attention_flex
from llmtrain.ops.outside_attention import attention_flash_attn, attention_xformers
from llmtrain.ops.registry import implementations

SMALL = Matrix(tile=4, longest=12, head_dims=((8, 8), (12, 8)), lse=False)
XFORMERS = importlib.util.find_spec("xformers") is not None
needs_xformers = pytest.mark.skipif(not XFORMERS, reason="the package xformers is not installed (make test-kernels installs it)")


@pytest.fixture
def flash_attn(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", outside_packages.FLASH_ATTN)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(call=calls(SMALL))
def test_flash_attn_is_asked_for_the_mask(flash_attn, call):
    check(attention_flash_attn, call, dtype=torch.bfloat16)
    check_mask(attention_flash_attn, call, dtype=torch.bfloat16)


@pytest.mark.parametrize("documents", [None, ((3, 4), (5, 2))])
def test_flash_attns_lse_comes_in_our_order(flash_attn, documents):
    call = AttentionCall(Mask(documents=documents), rows=2, heads=4, kv_heads=2, queries=7, keys=7, d=8, dv=8, lse=True)
    check(attention_flash_attn, call, dtype=torch.float16, backward=False)
    with pytest.raises(ValueError, match="log-sum-exp without a gradient"):
        check(attention_flash_attn, call, dtype=torch.float16)


@needs_xformers
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(call=calls(SMALL))
def test_xformers_is_asked_for_the_mask(call):
    package = importlib.import_module("xformers.ops")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(package, "memory_efficient_attention", outside_packages.memory_efficient_attention)
        check(attention_xformers, call, dtype=torch.float16)
        check_mask(attention_xformers, call, dtype=torch.float16)


@needs_xformers
def test_the_recorded_signature_is_xformers_own():
    pair = (importlib.import_module("xformers.ops").memory_efficient_attention, outside_packages.memory_efficient_attention)
    own, recorded = ([(p.name, p.kind, p.default) for p in inspect.signature(f).parameters.values()] for f in pair)
    assert own == recorded


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(
    "mask",
    [Mask(), Mask(window=3), Mask(causal=False), Mask(documents=((7, 11), (18,))), Mask(causal=False, documents=((9, 9), (1, 17)))],
)
def test_flex_is_asked_for_the_mask(mask, monkeypatch):
    """torch's function runs on the CPU as it is, forward alone: it has no backward there."""
    from torch.nn.attention.flex_attention import flex_attention as function

    monkeypatch.setattr(flex_attention, "_compiled", lambda: function)
    call = AttentionCall(mask, rows=2, heads=4, kv_heads=2, queries=11, keys=13, d=16, dv=16, q_offset=7, kv_offset=5, lse=True)
    check(attention_flex, call, dtype=torch.float32, backward=False)
    check_mask(attention_flex, call, backward=False)


def entry_named(name):
    return next(entry for entry in implementations("attention") if entry.name == name)


GPU = {"device": "cuda", "dtype": torch.bfloat16, "capability": (9, 0), "head_dim": 128, "value_head_dim": 128}


@pytest.mark.parametrize(
    ("name", "facts", "reason"),
    [
        ("flash_attn", {"dtype": torch.float32}, "serves float16, bfloat16"),
        ("flash_attn", {"capability": (7, 0)}, "needs compute capability 8.0, not 7.0"),
        ("flash_attn", {"head_dim": 320}, "takes head dims up to 256, not 320"),
        ("flash_attn", {"return_lse": True}, "gives a log-sum-exp without a gradient"),
        ("flash_attn", {"device": "cpu"}, "runs on cuda, not on cpu"),
        ("xformers", {"return_lse": True}, "returns no log-sum-exp"),
        ("xformers", {"deterministic": True}, "is not deterministic"),
        ("flex", {"capability": (7, 0)}, "no tensor cores at compute capability 7.0"),
    ],
)
def test_what_they_cannot_serve_is_said(name, facts, reason):
    installed = replace(entry_named(name), probe=lambda: None)
    assert reason in installed.refusal(Call(**GPU | facts))
    assert installed.refusal(Call(**GPU)) is None


@pytest.mark.parametrize(("name", "package"), [("flash_attn", "flash-attn"), ("xformers", "xformers"), ("flex", "triton")])
def test_a_missing_package_is_named(name, package, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert package in entry_named(name).probe.__wrapped__()


def test_auto_takes_none_of_them():
    for lse in (False, True):
        chosen = choose("attention", Call(**GPU | {"return_lse": lse})).name
        assert chosen not in ("flash_attn", "xformers", "flex", "fast_reference")
