"""What is declared of frameworks, against figures of their own that no fit has seen: bytes of allocators, stages, lanes of links."""

import pytest

from llmtrain.config.model import ModelConfig
from llmtrain.config.run import RunConfig
from llmtrain.hardware import Quantity, load
from llmtrain.simulate.case import Case
from llmtrain.simulate.engines import fits
from llmtrain.simulate.habits import Habits
from llmtrain.simulate.held import rank_held
from llmtrain.simulate.links import Group, seconds
from llmtrain.simulate.memory import Memory, memory
from llmtrain.simulate.of_config import case_of
from llmtrain.simulate.published import read
from llmtrain.simulate.rates import Rates, machine
from llmtrain.simulate.scripts import completed
from llmtrain.simulate.search import applied, candidates
from llmtrain.simulate.step import price

GIB, MIB = 2**30, 2**20
ROWS = {row.id: row for row in read()}
ALLOCATED = {"P066": (16809, 20536), "P068": (27321,), "P070": (13485, 12517, 12517, 13517), "P073": (19643,)}
"""MiB that baseline_results/*.json of MindSpeed-LLM call `allocated memory` after the first step, by pipeline rank."""


@pytest.mark.parametrize(("row", "sizes"), ALLOCATED.items())
def test_what_stays_after_a_step_is_what_the_allocator_holds(row, sizes):
    """Parameters, gradients and the whole optimizer, under ZeRO 1 with and without reuse-fp32-param."""
    case = ROWS[row].cases[0]
    ranks = memory(case.with_(habits=Habits(**{**vars(case.habits), "first_step": False})))
    for one, size in zip(ranks, sizes, strict=True):
        assert one.parameters + one.gradients + one.optimizer == pytest.approx(size * MIB, rel=0.02)


def test_the_first_step_makes_its_moments_after_the_backward_pass():
    """llama2_tp2_pp4_vpp2_swap: beside what stays, the largest parameter in fp32: 250 MiB of the embedding, 172 of the gates."""
    found = memory(ROWS["P070"].cases[0])
    assert [round(one.buffers / MIB) for one in found] == [250, 172, 172, 250]
    assert all(one.activations == one.logits == 0 for one in found)
    later = memory(ROWS["P071"].cases[0])  # its last stage holds more at the loss than all moments are
    assert later[1].activations > 0 and later[1].optimizer < later[0].optimizer


def test_nanotrons_stages_share_the_cost_of_blocks_and_head():
    """models/base.py: of 16 blocks and a head that costs four, the first of two ranks takes the one at which it exceeds its half."""
    assert ROWS["P237"].cases[0].split == (11, 5)
    assert ROWS["P246"].cases[0].split == (9, 9, 8, 6)


def test_a_mesh_gives_a_group_the_lanes_between_its_members():
    ascend = machine(load("ascend-910b"), Rates(), dtype="bfloat16", fused=True)
    nvidia = machine(load("h100-80"), Rates(), dtype="bfloat16", fused=True)
    for found, slower in ((ascend, 7.0), (nvidia, 1.0)):
        pair, whole = ((seconds(found, Group(n, n), "all_gather", 1e9 / (n - 1)) - found.latency * (1 + (n - 1) / 8)) for n in (2, 8))
        assert pair / whole == pytest.approx(slower)


def test_scripts_complete_the_rows_that_they_ran():
    rows = [row for row in read() if completed(row.row) != row.row]
    assert len(rows) == 14 and all("tests/" in row.row["locator"] for row in rows)
    assert ROWS["P066"].cases[0].split == (2, 0) and ROWS["P066"].cases[0].model.ffn.dense_layers == 1
    assert ROWS["P256"].cases[0].model.vocab_size == 256_000
    assert ROWS["P259"].cases[0].split == (2, 2, 2, 2, 2, 2, 1, 1)


def test_engines_have_their_axes_and_share_what_they_share():
    cfg, hardware = RunConfig.load("configs/qwen3_8b.yaml"), load("h100-80")
    found = list(candidates(cfg, hardware, 16, ("native", "deepspeed", "megatron")))
    by = {name: [one for one in found if one.habits.name == name] for name in ("llmtrain", "deepspeed", "megatron")}
    assert {one.shard for one in by["deepspeed"]} == {"zero1", "zero2", "zero3"}
    assert all(one.tp == one.pp == one.cp == 1 for one in by["deepspeed"])
    assert any(one.tp * one.pp > 1 for one in by["megatron"]) and not any(one.recompute - {"full"} for one in by["megatron"])
    assert not fits("megatron", by["llmtrain"][0].with_(tp=16), cfg.model)  # 8 key/value heads
    held = [memory(one)[0].total for one in by["deepspeed"][:3]]
    assert held == sorted(held, reverse=True)  # stages 1 to 3 of one mesh
    changes = applied(cfg, by["deepspeed"][1])
    assert changes["engine"] == {"kind": "deepspeed", "zero": 2}
    for name, zero in (("deepspeed", "zero2"), ("megatron", "zero1")):
        own = cfg.model_copy(update={"engine": cfg.engine.model_copy(update={"kind": name, "zero": 2})})
        case = case_of(RunConfig.load({**own.model_dump(mode="json", exclude={"engine"}), "engine": name}), hardware, 8)
        assert case.shard == zero and case.habits.weight_bytes == 2


def test_ranks_that_share_cores_hide_nothing_and_lend_what_they_leave():
    values = {"vocab_size": 512, "layers": 4, "hidden": 64, "attention": {"heads": 4}, "ffn": {"hidden": 128}, "max_seq_len": 64}
    model, given = ModelConfig.model_validate(values), load("h100-80")
    shared = given.model_copy(update={"cores": 2.0, "devices_per_node": 4})
    one = Case(model=model, hardware=shared, seq_len=64, pp=4, micros=4)
    apart, together = (price(one.with_(hardware=hardware), Rates()) for hardware in (given, shared))
    assert together.parts["bubble"] < 0.7 * apart.parts["bubble"]  # of two stages on a core one computes while the other waits


def test_what_an_allocator_keeps_follows_from_the_axes():
    values = {"vocab_size": 512, "layers": 4, "hidden": 64, "attention": {"heads": 4}, "ffn": {"hidden": 128}, "max_seq_len": 64}
    model, given = ModelConfig.model_validate(values), load("h100-80")
    shares = {"all": 0.2, "fsdp": 3.0, "tp": 2.0}
    rates = given.rates.model_copy(update={"retained": {name: Quantity(value=value, source="") for name, value in shares.items()}})
    keeping = given.model_copy(update={"rates": rates})

    def kept(**mesh) -> tuple[float, Memory]:
        case = Case(model=model, hardware=given, seq_len=64, micros=4, shard="zero3", **mesh)
        plain, more = memory(case)[0], memory(case.with_(hardware=keeping))[0]
        return more.total - plain.total, plain

    one, held = kept()
    assert one == pytest.approx(0.2 * (held.total - held.fragments))
    gathered = 2 * rank_held(Case(model=model, hardware=given), 0).all  # bytes, in 16 bits
    two, held = kept(dp=2)
    assert two == pytest.approx(0.2 * (held.total - held.fragments) + 3.0 * gathered)
    split, held = kept(tp=2)
    assert split == pytest.approx(0.2 * (held.total - held.fragments) + 2.0 * held.activations)
