"""The plan of a run's pipeline."""

import pytest

from llmtrain.config.run import RunConfig
from llmtrain.errors import UserError
from llmtrain.layout.pipeline import PipelinePlan


def plan(layers: int = 6, tied: bool = False, heads: int = 0, **parallel) -> PipelinePlan:
    model = {"vocab_size": 64, "layers": layers, "tie_embeddings": tied, "mtp": {"heads": heads}}
    return PipelinePlan.from_config(RunConfig.model_validate({"model": model, "parallel": parallel}))


def test_every_block_is_in_one_stage_and_every_stage_on_one_rank():
    found = plan(pp=2, virtual_stages=3, layers_per_stage=[1, 2, 1, 1, 1, 0])
    assert [i for stage in range(found.stages) for i in found.blocks(stage)] == list(range(6))
    assert [found.stages_of(rank) for rank in range(2)] == [[0, 2, 4], [1, 3, 5]]


def test_a_v_holds_two_stages_a_rank_without_being_told():
    found = plan(pp=2, schedule="zbv")
    assert (found.virtual, found.stages_of(0), found.stages_of(1)) == (2, [0, 3], [1, 2])


@pytest.mark.parametrize("options, copies", [({}, False), ({"tied": True}, True), ({"heads": 1}, True)])
def test_the_last_stage_needs_the_embedding_where_it_is_tied_or_looks_ahead(options, copies):
    assert plan(pp=2, **options).copies_embedding is copies


def test_what_a_run_says_of_its_pipeline():
    said = plan(pp=2, layers_per_stage=[4, 2]).describe(4)
    assert said == "1f1b, blocks by stage 4, 2; 4 micro-batches leave a bubble of 20.0% (B = 2F, no communication)"


def test_forwards_take_any_number_of_micro_batches_where_a_step_may_not():
    found = plan(pp=2, schedule="dualpipev")
    with pytest.raises(UserError, match=r"dualpipev needs 2 x parallel\.pp = 2 x 2 = 4 micro-batches"):
        found.schedule(3)
    assert sum(len(actions) for actions in found.forwards(3).actions) == 3 * 4
