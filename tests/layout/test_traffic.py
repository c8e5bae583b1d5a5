"""Traffic as arithmetic: equal, call by call and byte by byte, to what real worlds of the real loop hand to their process groups."""

import pytest
from sameness import BASE, merge
from worlds import run_world

from llmtrain.config.parameters import count_parameters
from llmtrain.config.run import RunConfig
from llmtrain.layout.mesh import AXES, MeshShape
from llmtrain.layout.shards import Shards
from llmtrain.layout.steps import StepPlan
from llmtrain.layout.traffic import sent, traffic

MOE = {"model": {"ffn": {"kind": "moe", "experts": 4, "top_k": 2, "hidden": 16}}}
LATENT = {"kind": "mla", "heads": 4, "query_rank": 20, "kv_rank": 12, "nope_dim": 8, "rope_dim": 4, "value_dim": 6}
MLA, DIRECT_MLA = ({"model": {"attention": LATENT | change}} for change in ({}, {"query_rank": None}))
DEEPSEEK = merge(MLA, {"model": {"ffn": MOE["model"]["ffn"] | {"shared_experts": 1, "dense_layers": 1, "dense_hidden": 40}}})
BIASED = {"model": {"ffn": {"router": {"score": "sigmoid", "groups": 2, "bias_rate": 0.01}}}}
BIGMAC = {"model": {"ffn": {"kind": "moe", "experts": 4, "top_k": 2, "hidden": 32, "descend": 8, "activation": "gelu", "bias": True}}}
GPT = {
    "position": {"kind": "learned"},
    "max_seq_len": 32,
    "norm": {"kind": "layer_norm"},
    "ffn": {"activation": "gelu", "bias": True, "hidden": 48},
    "attention": {"qkv_bias": True, "out_bias": True},
}
FULL = {"train": {"recompute": "full"}}
PERMUTE = {"train": {"recompute": ["permute", "norms"], "offload": ["expert_output"]}}
MLA_UP = {"train": {"recompute": ["mla_up"]}}
ONES = {"train": {"micro_batch": 1}}
TIED = {"model": {"tie_embeddings": True}}


def on(*changes: dict, **axes) -> dict:
    merged = {"parallel": axes}
    for change in changes:
        merged = merge(merged, change)
    return merged


def balanced(sequences: int | str) -> dict:
    return {"model": {"ffn": {"balance": {"sequences": sequences}}}}


TWO = {
    "tp2": on(tp=2),
    "tp2, pieces, full": on(FULL, tp=2, tp_chunks=3),
    "tp2, selective, fp64": on({"train": {"recompute": "selective"}, "precision": "fp64"}, tp=2),
    "tp2, mtp": on({"model": {"mtp": {"heads": 2}}}, tp=2),
    "pp2, 1f1b": on(pp=2),
    "pp2, interleaved, tied": on(TIED, pp=2, virtual_stages=2),
    "shard 2, bf16": on({"precision": "bf16"}, dp_shard=2),
    "shard 2, kept gathered": on(ONES, dp_shard=2, reshard_after_forward=False),
    "shard 2, mtp": on(ONES, {"model": {"mtp": {"heads": 2}}}, dp_shard=2),
    "cp2, all_gather": on(cp=2),
    "cp2, ring, full": on(FULL, cp=2, cp_kind="ring"),
    "cp2, ulysses, selective": on({"train": {"recompute": "selective"}}, cp=2, cp_kind="ulysses"),
    "ep2, full": on(MOE, FULL, dp_shard=2, ep=2),
    "etp2": on(MOE, tp=2, etp=2),
    "tp2, mla, pieces": on(MLA, tp=2, tp_chunks=3),
    "tp2, mla straight from the hidden state, full": on(DIRECT_MLA, FULL, tp=2),
    "cp2, mla": on(MLA, cp=2),
    "cp2, mla, ring": on(MLA, cp=2, cp_kind="ring"),
    "cp2, mla, ulysses": on(MLA, cp=2, cp_kind="ulysses"),
    "ep2, deepseek": on(DEEPSEEK, BIASED, ONES, dp_shard=2, ep=2),
    "ep2, bigmac, groups of 4": on(BIGMAC, balanced(4), dp_shard=2, ep=2),
    "tp2, deepseek, whole step": on(DEEPSEEK, balanced("step"), tp=2),
    "ep2, permute": on(MOE, PERMUTE, dp_shard=2, ep=2),
    "etp2, permute": on(MOE, PERMUTE, tp=2, etp=2),
    "tp2, mla, mla_up": on(MLA, MLA_UP, tp=2),
    "cp2, mla, mla_up": on(MLA, MLA_UP, cp=2),
    "cp2, mla, ring, mla_up": on(MLA, MLA_UP, cp=2, cp_kind="ring"),
}
FOUR = {
    "tp2 dp2, full, bf16": on(FULL, ONES, {"precision": "bf16"}, tp=2, dp_shard=2),
    "tp2 pp2, accumulation": on(ONES, tp=2, pp=2),
    "hsdp, mtp": on(ONES, {"model": {"mtp": {"heads": 1}}}, dp_replicate=2, dp_shard=2),
    "ep2 of hsdp": on(MOE, ONES, dp_replicate=2, dp_shard=2, ep=2),
    "ep2 over tp": on(MOE, ONES, dp_shard=2, tp=2, ep=2),
    "ep4 by nodes": on(MOE, FULL, dp_shard=2, tp=2, ep=4, ep_kind="hierarchical"),
    "ep4 by nodes of one, permute": on(MOE, PERMUTE, {"precision": "bf16"}, dp_shard=4, ep=4, ep_kind="hierarchical", ep_inner=1),
    "ep2 by nodes, etp2": on(MOE, ONES, dp_shard=2, tp=2, ep=2, etp=2, ep_kind="hierarchical", ep_inner=1),
    "cp2 tp2, capacity": on(MOE, {"model": {"ffn": {"capacity": {}}}}, cp=2, tp=2),
    "cp2 tp2, ring": on(ONES, cp=2, tp=2, cp_kind="ring"),
    "tp4, few key heads, biases": on({"model": GPT}, tp=4),
    "pp2 dp2, mtp": on(ONES, {"model": {"mtp": {"heads": 1}}}, pp=2, dp_shard=2),
    "pp2 dp2, deepseek, groups of 2, mtp": on(DEEPSEEK, balanced(2), ONES, {"model": {"mtp": {"heads": 1}}}, pp=2, dp_shard=2, ep=2),
    "ep4 over tp, deepseek, whole step, full": on(DEEPSEEK, BIASED, balanced("step"), FULL, ONES, dp_shard=2, tp=2, ep=4),
    "cp2 of hsdp, bigmac, groups of 4": on(BIGMAC, balanced(4), ONES, dp_replicate=2, cp=2, ep=2),
}
WORLDS = {2: TWO, 4: FOUR}


@pytest.fixture(scope="session")
def counted(tmp_path_factory) -> dict[str, dict]:
    found = {}
    for ranks, scenarios in WORLDS.items():
        folder = tmp_path_factory.mktemp(f"traffic-{ranks}")
        found |= run_world("traffic_world:count_all", ranks, args={"scenarios": scenarios}, folder=folder)
    return found


@pytest.mark.parametrize("name", [*TWO, *FOUR])
def test_calls_and_bytes_are_those_of_a_real_world(counted, name):
    for rank, (found, expected) in enumerate(counted[name]["traffic"]):
        assert found == expected, f"rank {rank}"


@pytest.mark.parametrize("name", [*TWO, *FOUR])
def test_a_rank_holds_what_arithmetic_says(counted, name):
    for rank, (expected, built) in enumerate(counted[name]["held"]):
        assert built == expected, f"rank {rank}"


def resolved(changes: dict) -> tuple[RunConfig, MeshShape]:
    cfg = RunConfig.model_validate(merge(BASE, changes))
    return cfg, MeshShape.from_config(cfg.parallel)


@pytest.mark.parametrize(
    "changes",
    [
        on(pp=2, tp=2, dp_shard=3, cp=2),
        on(TIED, pp=3, tp=4, dp_replicate=2, dp_shard=7),
        on(MOE, dp_shard=4, tp=2, ep=4),
        on(MOE, dp_shard=6, tp=2, ep=2, etp=2),
        on({"model": {**GPT, "mtp": {"heads": 2}}}, pp=3, tp=2, dp_shard=2),
        on(DEEPSEEK, {"model": {"mtp": {"heads": 1}}}, pp=2, tp=2, dp_shard=4, ep=4),
        on(BIGMAC, dp_shard=3, tp=2, cp=2, ep=4),
    ],
    ids=lambda changes: str(changes["parallel"]),
)
def test_distinct_shards_make_up_the_model(changes):
    cfg, shape = resolved(changes)
    total = 0
    for rank in range(shape.world):
        place = shape.place(rank)
        if place["dp_replicate"]:
            continue
        for held in Shards(cfg, shape, rank=rank).held():
            twice = held.partial and place["tp"]  # ranks of tp hold the same
            total += 0 if held.copy or twice else held.elements
    assert total == count_parameters(cfg.model)["total"]


def test_every_rank_sends_what_another_one_gets():
    cfg, shape = resolved(on(ONES, tp=2, pp=2, dp_shard=2))
    (segment,) = StepPlan.from_config(cfg).segments
    rows = [{(row.axis, row.kind): row for row in traffic(cfg, shape, segment, rank=rank)} for rank in range(shape.world)]
    for axis in AXES:
        for group in shape.groups(axis):
            for kind in ("all_gather", "reduce_scatter", "all_reduce"):
                assert len({rows[rank].get((axis, kind)) for rank in group.ranks}) == 1, (axis, kind)
    sends = [rows[rank]["pp", "send"].calls for rank in range(shape.world)]
    assert sends == [4] * shape.world  # 8 samples over 2 ranks: 4 micro-batches, each sent on once by either stage


@pytest.mark.parametrize(
    ("kind", "size", "bytes_"),
    [("all_gather", 12, 36), ("reduce_scatter", 12, 36), ("all_reduce", 12, 18), ("all_to_all", 12, 9), ("send", 12, 12)],
)
def test_the_convention(kind, size, bytes_):
    assert sent(kind, size, 4) == bytes_


def test_unknown_kind():
    with pytest.raises(ValueError, match="'gather': known are all_gather"):
        sent("gather", 1, 2)


def test_one_rank_sends_nothing():
    cfg, shape = resolved({})
    (segment,) = StepPlan.from_config(cfg).segments
    assert traffic(cfg, shape, segment, rank=0) == []
