"""train.compile: the same numbers, compiled once whatever the documents, decided from the length of the run."""

import pytest
import torch
from sameness import gradient_difference, loss_difference
from worlds import run_world

from llmtrain.config.run import RunConfig
from llmtrain.errors import UserError
from llmtrain.parallel import compile as blocks

FP64, COMPILED = {"precision": "fp64"}, {"train": {"compile": "on"}}
RUNS = {
    1: {
        "eager": {"changes": FP64 | {"train": {"compile": "off"}}},
        "compiled": {"changes": FP64 | COMPILED},
        "compiled, recompute full": {"changes": FP64 | {"train": {"compile": "on", "recompute": "full"}}},
    },
    2: {"compiled, shard 2": {"changes": FP64 | COMPILED | {"parallel": {"dp_shard": 2}}}},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, dict]:
    results = {}
    for ranks, scenarios in RUNS.items():
        folder = tmp_path_factory.mktemp(f"world-{ranks}")
        results |= run_world("sameness:train_all", ranks, args={"scenarios": scenarios}, folder=folder)
    return results


@pytest.mark.parametrize("name", ["compiled", "compiled, recompute full", "compiled, shard 2"])
def test_compiled_blocks_give_the_same_numbers(runs, name):
    assert loss_difference(runs[name], runs["eager"]) < 1e-10
    assert gradient_difference(runs[name], runs["eager"]) < 1e-9


@pytest.mark.parametrize("name", ["compiled", "compiled, shard 2"])
def test_only_the_first_step_compiles_though_every_step_has_other_documents(runs, name):
    first, *later = runs[name]["metrics"]
    assert first["compile_seconds"] > 0.1
    assert not any("compile_seconds" in step for step in [*later, *runs["eager"]["metrics"]])


def config(**train) -> RunConfig:
    model = {"vocab_size": 1000, "layers": 2, "hidden": 64, "attention": {"heads": 4}, "ffn": {"hidden": 128}}
    return RunConfig.model_validate({"model": model, "train": {"steps": 1000, "seq_len": 128, "global_batch": 8} | train})


def test_auto_goes_by_the_work_of_a_rank(monkeypatch):
    work = 1000 * 8 * 128 * blocks.flops_per_token(config().model, 128)
    monkeypatch.setattr(blocks, "WORTH", {"cpu": 0.9 * work})
    assert blocks.decide(config(), kind="cpu", ranks=1).on
    assert not blocks.decide(config(), kind="cpu", ranks=2).on
    assert not blocks.decide(config(steps=500), kind="cpu", ranks=1).on


def test_auto_leaves_a_plugins_family_alone_and_on_tries_it(monkeypatch):
    monkeypatch.setattr(blocks, "WORTH", {"cpu": 0.0})
    other = {"update": {"model": config().model.model_copy(update={"family": "mine"})}}
    assert blocks.decide(config(), kind="cpu", ranks=1).on
    assert "model.family mine may not compile" in str(blocks.decide(config().model_copy(**other), kind="cpu", ranks=1))
    assert blocks.decide(config(compile="on").model_copy(**other), kind="cpu", ranks=1).on


def test_a_short_run_is_not_compiled_and_says_why():
    decision = blocks.decide(config(), kind="cpu", ranks=1)
    assert not decision.on
    assert "longer than it saves" in str(decision)


def test_what_stands_in_the_way(monkeypatch):
    assert "has not been tried on npu" in str(blocks.decide(config(), kind="npu", ranks=1))
    with pytest.raises(UserError, match=r"train\.compile on: train\.recompute selective .* set train\.compile"):
        blocks.decide(config(compile="on", recompute="selective"), kind="cpu", ranks=1)
    for option in ({"recompute": ["norms"]}, {"offload": ["block_input"]}):
        assert "are told apart by what they save" in str(blocks.decide(config(**option), kind="cpu", ranks=1))
    monkeypatch.setattr(blocks.shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="C\\+\\+ compiler"):
        blocks.decide(config(compile=True), kind="cpu", ranks=1)
    assert not blocks.decide(config(), kind="cpu", ranks=1).on
    assert not blocks.decide(config(compile=False), kind="cpu", ranks=1).on


def test_a_family_without_the_parts_is_named():
    model = torch.nn.Module()
    model.blocks = torch.nn.ModuleDict({"0": torch.nn.Linear(2, 2)})
    with pytest.raises(UserError, match="a block of Linear has no method before_attention"):
        blocks.apply_compile(model)
