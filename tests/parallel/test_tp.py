"""Whole models shared by ranks of tp against one process, in float64: loss, logits and every gradient."""

import math

import pytest
from worlds import run_world

from llmtrain.config.model import ModelConfig
from llmtrain.errors import UserError
from llmtrain.parallel.tp import check_tp

GPT = {
    "attention": {"heads": 4, "qkv_bias": True, "out_bias": True},
    "ffn": {"hidden": 40, "activation": "gelu", "bias": True},
    "norm": {"kind": "layer_norm"},
    "position": {"kind": "learned"},
}
QWEN = {
    "attention": {"heads": 4, "kv_heads": 2, "qk_norm": True, "qkv_bias": True},
    "ffn": {"hidden": 40, "bias": True},
    "norm": {"placement": "sandwich"},
}
ONE_KV_HEAD = {"attention": {"heads": 4, "kv_heads": 1, "qk_norm": True}}
MOE = {"ffn": {"kind": "moe", "experts": 4, "top_k": 2, "hidden": 24}}
CASES = {
    "llama": {"changes": {}},
    "grouped key/value heads, qk_norm, biases, sandwich, 3 chunks": {"changes": QWEN, "chunks": 3},
    "one key/value head": {"changes": ONE_KV_HEAD, "batch": 1, "chunks": 2},
    "gpt, 4 chunks": {"changes": GPT, "chunks": 4, "batch": 3},
    "tied": {"changes": {"tie_embeddings": True}, "batch": 1},
    "mtp": {"changes": {"mtp": {"heads": 2}}, "ahead": 2},
    "experts": {"changes": MOE},
    "recompute full": {"changes": QWEN, "recompute": "full", "chunks": 2},
    "recompute selective": {"changes": QWEN, "recompute": "selective", "chunks": 2},
    "frozen attention": {"changes": QWEN, "frozen": ".attention."},
    "even vocabulary": {"changes": {"vocab_size": 64}},
}
JOBS = {
    "compare": CASES | {"a sum left out": {"changes": {}, "break_sum": True}},
    "collectives": {"plain": {"chunks": 1}, "in pieces": {"chunks": 3}, "long": {"chunks": 1, "length": 48, "layers": 2}},
    "stages": {"untied": {"changes": GPT}, "tied": {"changes": {"tie_embeddings": True}}},
}
FSDP = {
    "float64": {"changes": QWEN, "compute": "fp64", "params": "fp64"},
    "tied": {"changes": {"tie_embeddings": True}, "compute": "fp64", "params": "fp64"},
    "one key/value head": {"changes": ONE_KV_HEAD, "compute": "fp64", "params": "fp64"},
    "bf16": {"changes": QWEN, "compute": "bf16", "params": "fp32"},
}


@pytest.fixture(scope="module", params=[2, 4])
def found(request, tmp_path_factory):
    jobs = JOBS | ({"with_fsdp": FSDP} if request.param == 4 else {})
    return run_world("tp_world:in_world", request.param, args={"jobs": jobs}, folder=tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize("name", CASES)
def test_same_as_one_process(found, name):
    case = found["compare"][name]
    assert max(case["loss"], case["logits"], case["gradient"]) < 1e-10, case


def test_a_sum_left_out_is_seen(found):
    assert found["compare"]["a sum left out"]["gradient"] > 0.01


def test_what_is_split(found):
    ranks = found["collectives"]["plain"]["ranks"]
    split = {name.removeprefix("blocks.0.") for name in found["compare"][list(CASES)[1]]["split"] if not name.startswith("blocks.1.")}
    keys = {f"attention.{proj}_proj.{part}" for proj in "kv" for part in ("weight", "bias")}
    expected = {"embedding.weight", "head.weight", "attention.q_proj.weight", "attention.q_proj.bias", "attention.out_proj.weight"}
    expected |= {f"ffn.{proj}_proj.{part}" for proj in ("gate", "up") for part in ("weight", "bias")} | {"ffn.down_proj.weight"}
    assert split == expected | (keys if ranks == 2 else set())  # two key/value heads cannot be split by four


@pytest.mark.parametrize("name", JOBS["collectives"])
def test_number_and_size_of_collectives(found, name):
    """The table in docs/tensor-parallel.md."""
    case, found = JOBS["collectives"][name], found["collectives"][name]
    chunks, layers, whole = case["chunks"], found["layers"], found["whole"]
    positions = whole // 32
    rows = positions // found["ranks"]
    pieces = math.ceil(rows / 5)
    forward, backward = found["forward"], found["backward"]
    assert (forward["other"], backward["other"]) == ([], [])
    assert len(forward["gather"]) == layers * 2 * chunks + 2 * pieces
    assert len(forward["scatter"]) == 1 + layers * 2 * chunks + pieces
    assert sum(forward["gather"]) == (layers * 2 + 1) * whole + 2 * found["ranks"] * positions
    assert sum(forward["scatter"]) == (1 + layers * 2 + 1) * whole
    assert len(backward["gather"]) == layers * 4 * chunks + 1
    assert len(backward["scatter"]) == layers * 2 * chunks
    assert sum(backward["gather"]) == (layers * 4 + 1) * whole
    assert sum(backward["scatter"]) == layers * 2 * whole


@pytest.mark.parametrize("name", JOBS["stages"])
def test_pipeline_stages(found, name):
    assert max(found["stages"][name].values()) < 1e-10, found["stages"][name]


@pytest.mark.parametrize("name", FSDP)
def test_inside_fsdp(found, name):
    if "with_fsdp" not in found:
        pytest.skip("needs four ranks")
    case = found["with_fsdp"][name]
    if name == "bf16":
        # Against float64 no worse than one process in bf16 is.
        assert case["gradient"] < 1.5 * case["control gradient"] and case["loss"] < 1e-3, case
    else:
        assert max(case.values()) < 1e-10, case


@pytest.mark.parametrize(
    "changes, ranks, words",
    [
        ({"attention": {"heads": 6}, "hidden": 48}, 4, "6 / 4 = 1.5 heads"),
        ({"attention": {"heads": 12, "kv_heads": 6}, "hidden": 48}, 4, "kv_heads 6"),
        ({"attention": {"heads": 4}, "ffn": {"hidden": 42}}, 4, "model.ffn.hidden 42"),
        ({"attention": {"heads": 4}, "vocab_size": 6}, 4, "model.vocab_size 6"),
    ],
)
def test_what_does_not_divide_is_refused(changes, ranks, words):
    with pytest.raises(UserError, match=r"parallel\.tp 4") as error:
        check_tp(ModelConfig.model_validate({"vocab_size": 61, "hidden": 32} | changes), ranks)
    assert words in str(error.value)
