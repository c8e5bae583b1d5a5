"""What the engine megatron refuses, each by the name of its option; no megatron-core is needed for that."""

import pytest
from sameness import BASE, merge

from llmtrain.config.run import RunConfig
from llmtrain.engine import megatron_check
from llmtrain.engine.base import check_engine
from llmtrain.engine.megatron_check import check
from llmtrain.errors import UserError
from llmtrain.layout.mesh import MeshShape
from llmtrain.stages import session  # noqa: F401 - registers the engines

MOE = {"kind": "moe", "experts": 4, "top_k": 2, "hidden": 16}
MLA = {"kind": "mla", "heads": 4, "query_rank": 12, "kv_rank": 9, "nope_dim": 8, "rope_dim": 4, "value_dim": 6}


@pytest.fixture(autouse=True)
def installed(monkeypatch):
    monkeypatch.setattr(megatron_check, "installed_version", lambda package: "0.16.1")


def config(changes: dict) -> RunConfig:
    return RunConfig.model_validate(merge(BASE, changes | {"engine": "megatron"}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"mtp": {"heads": 1}, "tie_embeddings": True}, "parallel": {"pp": 2}}, r"model\.mtp\.heads 1 with model\.tie_emb"),
        ({"model": {"norm": {"c_ffn": "auto"}}}, r"c_attention or c_ffn auto"),
        ({"model": {"attention": {"out_bias": True}}}, r"model\.attention\.qkv_bias, out_bias and model\.ffn\.bias"),
        ({"model": {"ffn": MOE | {"balance": {"weight": 0.1}}}}, r"model\.ffn\.balance\.sequences step: 1, or train\.micro_batch 2"),
        (
            {"model": {"ffn": MOE | {"balance": {"sequences": 1}, "router": {"score": "sigmoid", "bias_rate": 0.1}}}},
            r"balance with router\.b",
        ),
        ({"model": {"ffn": MOE | {"capacity": {}}}}, r"model\.ffn\.capacity"),
        ({"model": {"ffn": MOE | {"router": {"bias_rate": 0.1}}}}, r"router\.bias_rate with score softmax"),
        ({"parallel": {"pp": 2, "schedule": "zero_bubble"}}, r"parallel\.schedule zero_bubble"),
        ({"parallel": {"dp_replicate": 2, "dp_shard": 2}}, r"parallel\.dp_replicate with dp_shard"),
        ({"parallel": {"tp": 4}}, r"parallel\.tp 4 does not divide model\.attention\.kv_heads 2"),
        ({"model": {"attention": MLA}, "parallel": {"tp": 2}}, r"kv_rank \(with rope_dim\) 13"),
        ({"train": {"recompute": ["norms"]}}, r"train\.recompute"),
        ({"optim": {"offload": True}}, r"optim\.offload"),
        ({"precision": "fp64"}, r"precision\.params"),
    ],
)
def test_an_option_in_the_way_is_named(changes, message):
    with pytest.raises(UserError, match=message):
        check(config(changes), shape=MeshShape(), device="cuda")


def test_what_it_runs_is_let_pass():
    check(config({"parallel": {"tp": 2, "pp": 2, "virtual_stages": 2}, "model": {"layers": 4}}), shape=MeshShape(), device="cuda")


def test_it_is_not_for_npus_yet():
    with pytest.raises(UserError, match=r"engine megatron on npu: not run there.*0\.12\.1.*engine native"):
        check_engine(config({}), shape=MeshShape(), device="npu")


@pytest.mark.parametrize(
    ("version", "message"), [(None, "megatron-core is not installed"), ("0.19.2", r"megatron-core 0\.19\.2 is installed")]
)
def test_another_megatron_core_is_refused(version, message, monkeypatch):
    monkeypatch.setattr(megatron_check, "installed_version", lambda package: version)
    with pytest.raises(UserError, match=message):
        check(config({}), shape=MeshShape(), device="cuda")
