"""The stages of a rank: cut from one model that is built once, and each a model of its own."""

import pytest
import torch
from sameness import BASE, merge

from llmtrain.config.run import RunConfig
from llmtrain.errors import UserError
from llmtrain.layout.pipeline import PipelinePlan
from llmtrain.model import family
from llmtrain.model.transformer import cut
from llmtrain.ops import Call, resolve
from llmtrain.parallel.apply import stage_models

CASES = {
    "plain": {},
    "tied": {"tie_embeddings": True},
    "mtp": {"mtp": {"heads": 1}},
    "learned": {"position": {"kind": "learned"}, "max_seq_len": 32},
}


def build(cfg: RunConfig) -> torch.nn.Module:
    ops = resolve({}, Call(device="cpu", dtype=torch.float32, documents=True, head_dim=8, heads=4, kv_heads=2))
    return family.build(cfg.model, ops, 16)


@pytest.mark.parametrize("schedule", ["interleaved", "zbv"])
@pytest.mark.parametrize("case", CASES)
def test_stages_are_those_of_models_built_apart(case, schedule):
    changes = {"model": {"layers": 5, **CASES[case]}, "parallel": {"pp": 2, "virtual_stages": 2, "schedule": schedule}}
    cfg = RunConfig.model_validate(merge(BASE, changes))
    plan, built = PipelinePlan.from_config(cfg), []

    def once():
        built.append(build(cfg))
        return built[-1]

    found = {rank: stage_models(once, plan=plan, rank=rank) for rank in range(2)}
    assert len(built) == 2, "one model per rank"
    assert sorted(stage for stages in found.values() for stage in stages) == list(range(4))
    for stages in found.values():
        held = [parameter for model in stages.values() for parameter in model.parameters()]
        assert len(held) == len({id(parameter) for parameter in held}), "stages share no parameter"
        for stage, model in stages.items():
            with torch.device("meta"):
                apart = build(cfg)
            cut(apart, blocks=plan.blocks(stage), first=stage == 0, last=stage == plan.stages - 1)
            assert [(name, p.shape) for name, p in model.named_parameters()] == [(name, p.shape) for name, p in apart.named_parameters()]
            assert all(parameter.is_meta for parameter in model.parameters())
            tied = case == "tied" and stage == plan.stages - 1
            assert tied == (model.head is not None and model.embedding is not None and model.head.weight is model.embedding.weight)


def test_a_family_that_cannot_be_cut():
    cfg = RunConfig.model_validate(merge(BASE, {"parallel": {"pp": 3}}))
    with pytest.raises(UserError, match=r"parallel\.pp: Linear cannot be cut into pipeline stages; set parallel\.pp: 1"):
        stage_models(lambda: torch.nn.Linear(2, 2), plan=PipelinePlan.from_config(cfg), rank=0)
