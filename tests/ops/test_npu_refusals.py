"""Calls that torch_npu would take, and compute something else: refused before it is asked, so no torch_npu is needed here."""

import pytest
import torch

from llmtrain.ops import Call, Mask, implementations
from llmtrain.ops.npu.attention import attention_npu
from llmtrain.ops.npu.attention_parts import attention_part_backward_npu, attention_part_npu
from llmtrain.ops.npu.experts import gating_top_k_softmax, grouped_mm_npu, permute_npu, unpermute_npu
from llmtrain.ops.npu.gateway import NAME, needs
from llmtrain.ops.npu.norm import add_rms_norm_npu, rms_norm_npu
from llmtrain.ops.npu.pointwise import rope_npu, swiglu_npu

r = torch.randn
HALF = torch.bfloat16


def heads(h=4, s=5, d=8, **kw):
    return r(1, h, s, d, **kw)


REFUSED = {
    "heads": (lambda: attention_npu(heads(3), heads(2), heads(2), mask=Mask()), "H a multiple of K"),
    "dtypes": (lambda: attention_npu(heads(), heads(), heads(dtype=HALF), mask=Mask()), "one dtype"),
    "head size": (lambda: attention_npu(heads(d=776), heads(d=776), heads(d=8), mask=Mask()), "up to 256 heads of up to 768"),
    "many heads": (lambda: attention_npu(heads(257), heads(257), heads(257), mask=Mask()), "up to 256 heads"),
    "lse": (lambda: attention_npu(heads(requires_grad=True), heads(), heads(), mask=Mask(), return_lse=True), r"torch.no_grad\(\)"),
    "lse of no key": (
        lambda: attention_npu(heads(), heads(), heads(), mask=Mask(), kv_offset=2, return_lse=True),
        "shows every query a key",
    ),
    "part": (lambda: attention_part_npu(heads(s=4), heads(s=5), heads(s=5), causal=True, scale=1.0), "causal with 4 queries and 5 keys"),
    "part keys": (lambda: attention_part_npu(heads(), heads(), heads(s=6), causal=False, scale=1.0), "needed q"),
    "part backward": (
        lambda: attention_part_backward_npu(*(heads(s=s) for s in (4, 4, 5, 5, 4)), r(1, 4, 4), causal=True, scale=1.0),
        "causal with 4 queries",
    ),
    "norm weight": (lambda: rms_norm_npu(r(2, 8), r(4), 1e-6), r"weight \(4,\)"),
    "norm dims": (lambda: rms_norm_npu(r(8), r(8), 1e-6), "2 to 8 dims"),
    "residual": (lambda: add_rms_norm_npu(r(2, 8), r(2, 1, 8), r(8), 1e-6), "one shape and dtype"),
    "residual dtype": (lambda: add_rms_norm_npu(r(2, 8), r(2, 8, dtype=HALF), r(8), 1e-6), "one shape and dtype"),
    "rope positions": (lambda: rope_npu(heads(), r(1, 1, 6, 8), r(1, 1, 6, 8)), r"cos \(1, 1, 6, 8\)"),
    "rope rows": (lambda: rope_npu(r(3, 2, 5, 8), r(2, 1, 5, 8), r(2, 1, 5, 8)), "B or 1"),
    "rope odd": (lambda: rope_npu(heads(d=7), r(1, 1, 5, 7), r(1, 1, 5, 7)), "even d"),
    "swiglu": (lambda: swiglu_npu(r(2, 8), r(2, 6)), "one shape and dtype"),
    "grouped widths": (lambda: grouped_mm_npu(r(4, 8), r(2, 6, 4), torch.tensor([2, 2])), r"\[E,D,F\]"),
    "grouped counts": (lambda: grouped_mm_npu(r(4, 8), r(2, 8, 4), torch.tensor([4])), r"counts \(1,\)"),
    "grouped dtype": (lambda: grouped_mm_npu(r(4, 8), r(2, 8, 4, dtype=HALF), torch.tensor([2, 2])), "of one dtype"),
    "grouped inner": (lambda: grouped_mm_npu(r(4, 8), torch.empty(2, 8, 1).expand(2, 8, 65536), torch.tensor([2, 2])), "up to 65535"),
    "permute rows": (lambda: permute_npu(r(4, 8), torch.zeros(3, 2, dtype=torch.int64), 4), r"\[N,D\] and \[N,k\]"),
    "permute k": (lambda: permute_npu(r(1, 8), torch.zeros(1, 513, dtype=torch.int64), 4), "k up to 512"),
    "permute copies": (lambda: permute_npu(r(1, 8), torch.zeros(1, 1, dtype=torch.int64).expand(16777215, 1), 4), "N\\*k up to 16777214"),
    "unpermute": (lambda: unpermute_npu(r(4, 8), torch.arange(4), r(3, 2)), r"probs \(3, 2\)"),
    "gating": (lambda: gating_top_k_softmax(r(3, 4), 5), "k 5"),
}


@pytest.mark.parametrize("call", REFUSED)
def test_wrong_shapes_and_dtypes_are_refused_here(call):
    run, message = REFUSED[call]
    with pytest.raises(ValueError, match=message):
        run()


@pytest.mark.parametrize(
    ("op", "facts", "reason"),
    [
        ("attention", {"return_lse": True}, "gives a log-sum-exp without a gradient"),
        ("attention", {"head_dim": 776}, "takes head sizes up to 768, not 776"),
        ("attention", {"head_dim": 64, "value_head_dim": 1024}, "takes head sizes up to 768, not 1024"),
        ("attention_part", {"heads": 257}, "takes up to 256 heads, not 257"),
        ("rope", {"head_dim": 896}, "rotates even head sizes below 896, not 896"),
        ("grouped_mm", {"expert_widths": (8, 65536)}, "takes widths up to 65535, not 65536"),
    ],
)
def test_what_cannot_serve_a_run_says_why(op, facts, reason):
    entry = next(entry for entry in implementations(op) if entry.name == NAME)
    assert entry.supports(Call(device="npu", dtype=HALF, **facts)) == reason
    assert entry.supports(Call(device="npu", dtype=HALF, head_dim=64, heads=8)) is None


def test_fp64_is_left_to_others():
    call = Call(device="npu", dtype=torch.float64)
    assert all(entry.refusal(call).startswith("serves float32") for op in ("attention", "rms_norm") for entry in implementations(op)[:1])


def test_a_single_expert_and_no_rows_never_reach_the_operator():
    x, weight = r(3, 8, requires_grad=True), r(1, 8, 4, requires_grad=True)
    torch.testing.assert_close(grouped_mm_npu(x, weight, torch.tensor([3])), x @ weight[0])
    nothing, many = r(0, 8, requires_grad=True), r(2, 8, 4, requires_grad=True)
    out = grouped_mm_npu(nothing, many, torch.tensor([0, 0]))
    grads = torch.autograd.grad(out.sum(), (nothing, many))
    assert out.shape == (0, 4) and [g.shape for g in grads] == [nothing.shape, many.shape] and not grads[1].any()


def test_calls_without_a_key_go_to_sdpa_and_say_zero():
    q, k, v = heads(), heads(), heads()
    out = attention_npu(q, k, v, mask=Mask(), kv_offset=2)
    assert not out[:, :, :2].any() and out[:, :, 2:].any(-1).all()


def test_the_probe_names_what_is_missing(monkeypatch):
    import sys

    assert "loaded when an NPU is selected" in needs("npu_rms_norm")()
    monkeypatch.setitem(sys.modules, "torch_npu", object())
    assert needs("npu_not_there", "npu_nor_this")() == "needs npu_not_there, npu_nor_this, which the torch_npu here does not have"
