"""What `parallel.tp_kind` and `parallel.ep_kind` come to on devices, and what is said of what cannot be."""

from dataclasses import replace

import pytest
import torch

from llmtrain.config.run import RunConfig
from llmtrain.errors import UserError
from llmtrain.layout.mesh import MeshShape
from llmtrain.parallel.choices import choices, lengths_of_sums
from llmtrain.parallel.ops.npu_limits import EXCHANGE, PAIRS, ExchangeDemand, refuse_exchange

A2, A3 = "ascend-910b", "ascend-910c"
DENSE = {"vocab_size": 1024, "layers": 2, "hidden": 1024, "attention": {"heads": 16, "kv_heads": 8}, "ffn": {"hidden": 4096}}
MOE = DENSE | {"ffn": {"kind": "moe", "experts": 64, "top_k": 4, "hidden": 512}}


def chosen(model=DENSE, *, device="npu", hardware=A2, precision="bf16", **parallel):
    changes = {"model": model, "precision": precision, "train": {"steps": 1, "seq_len": 2048, "global_batch": 64}, "parallel": parallel}
    cfg = RunConfig.model_validate(changes)
    return choices(cfg, MeshShape.from_config(cfg.parallel), device=device, hardware=hardware)


def test_auto_is_what_an_npu_can():
    assert str(chosen(tp=4)) == "tp mc2"
    assert str(chosen(MOE, hardware=A3, dp_shard=8, ep=8)) == "ep fused"
    assert str(chosen(tp=4, device="cpu")) == str(chosen(tp=4, device="cuda")) == "tp chunked"
    assert str(chosen(MOE, device="cuda", dp_shard=8, ep=8)) == "ep all_to_all"
    assert str(chosen(MOE, hardware=A3, dp_shard=16, ep=16, ep_kind="hierarchical", ep_inner=4)) == "ep hierarchical (4 nodes of 4 ranks)"
    assert str(chosen()) == ""


CANNOT = {
    "fp32": ({"tp": 4, "precision": "fp32"}, "computes in bfloat16 and float16, not in float32 (precision.compute)"),
    "16 ranks of an A2": (
        {"tp": 16, "model": DENSE | {"attention": {"heads": 64, "kv_heads": 64, "head_dim": 64}}},
        "on Atlas A2, not of 16",
    ),
    "narrow": ({"tp": 8}, "its products sum over 256 to 65,534 numbers; with parallel.tp 8 one of this model sums over 128"),
    "another NPU": ({"tp": 4, "hardware": "ascend-950"}, "documented for Atlas A2 and Atlas A3, not for ascend-950"),
}


@pytest.mark.parametrize("case", CANNOT)
def test_pairs_that_cannot_be(case):
    options, reason = CANNOT[case]
    assert str(chosen(**options)).startswith("tp chunked (mc2: ") and reason in str(chosen(**options))
    with pytest.raises(UserError, match=r"parallel\.tp_kind mc2: .*; use chunked"):
        chosen(**options, tp_kind="mc2")


def test_other_devices_have_none_of_it():
    with pytest.raises(UserError, match="tp_kind mc2: torch_npu's operators are there on npu alone, not on cpu; use chunked"):
        chosen(tp=4, tp_kind="mc2", device="cpu")
    with pytest.raises(UserError, match="ep_kind fused: torch_npu's operators are there on npu alone, not on cuda; use all_to_all"):
        chosen(MOE, dp_shard=8, ep=8, ep_kind="fused", device="cuda")


def test_exchanges_need_an_a3_that_is_known():
    assert str(chosen(MOE, dp_shard=8, ep=8)) == "ep all_to_all (fused: documented for Atlas A3, not for Atlas A2)"
    assert "none of those it is documented for" in str(chosen(MOE, dp_shard=8, ep=8, hardware=None))
    assert str(chosen(MOE, dp_shard=8, ep=8, hardware=None, ep_kind="fused")) == "ep fused"  # before ranks start, the NPU is not known


FITS = ExchangeDemand("npu", 8, 64, (1024, 512), 4, (16 << 20,), torch.bfloat16, A3)
OUTSIDE = {
    "ranks": ({"ranks": 4}, "takes groups of 8, 16, 32, 64 ranks on Atlas A3, not of 4"),
    "experts of a rank": ({"experts": 512}, "takes up to 32 experts a rank and 256 in all, not 64 and 512"),
    "top_k": ({"choices": 1}, "takes 2 to 8 experts a token, not model.ffn.top_k 1"),
    "width": ({"widths": (1024, 70000)}, "takes widths up to 65,535, not 70,000"),
    "little": ({"sent": (1 << 20,)}, "a rank may send 2 to 100 MiB at a time, not 1 MiB"),
    "much": ({"sent": (16 << 20, 200 << 20)}, "not 200 MiB (tokens of a micro-batch x top_k x hidden width); change train.micro_batch"),
    "float32": ({"dtype": torch.float32}, "not in float32"),
}


@pytest.mark.parametrize("case", OUTSIDE)
def test_exchanges_that_cannot_be(case):
    assert refuse_exchange(FITS) is None
    changes, reason = OUTSIDE[case]
    assert reason in refuse_exchange(replace(FITS, **changes))


def test_lengths_of_sums():
    """hidden 1024; 16 heads of 64 and 8 of keys and values over 4 ranks: 256 for the output, 512 for queries, keys and values; F 4096."""
    cfg = RunConfig.model_validate({"model": DENSE}).model
    assert lengths_of_sums(cfg, 4) == (256, 512, 1024, 2048)
    assert lengths_of_sums(cfg, 16) == (64, 192, 256, 512, 1024)  # fewer keys and values than ranks: each computes one head
    assert lengths_of_sums(RunConfig.model_validate({"model": MOE}).model, 4) == (256, 512, 1024)


def test_the_documented_limits():
    assert PAIRS.ranks == {"Atlas A2": (2, 4, 8), "Atlas A3": (2, 4, 8, 16)} and PAIRS.sums == range(256, 65535)
    assert EXCHANGE.ranks == {"Atlas A3": (8, 16, 32, 64)} and PAIRS.dtypes == EXCHANGE.dtypes == (torch.bfloat16, torch.float16)
