"""Blocks per pipeline stage: the least largest cost, the arithmetic of costs, and lists given by the user."""

from itertools import product

import pytest

from llmtrain.config.model import ModelConfig
from llmtrain.config.parameters import flops_per_token
from llmtrain.errors import UserError
from llmtrain.layout.stages import PartCosts, balance, check_layers, costs, rank_totals, split_layers

PANGU = {
    "vocab_size": 153_376,
    "hidden": 12_288,
    "layers": 94,
    "attention": {"heads": 96, "kv_heads": 8, "head_dim": 128},
    "ffn": {"hidden": 28_672},
}


def splits(layers: int, stages: int):
    """Every way to share blocks out such that only the first and the last stage may be empty."""
    for head in product(range(layers + 1), repeat=stages - 1):
        split = (*head, layers - sum(head))
        if split[-1] >= 0 and all(split[1:-1]):
            yield split


@pytest.mark.parametrize("extras", [(0.0, 0.0), (0.0, 1.3), (0.5, 0.7), (0.0, 4.0), (2.2, 0.0)])
@pytest.mark.parametrize(("layers", "stages"), [(3, 1), (1, 2), (5, 2), (6, 3), (7, 4), (9, 4), (3, 5)])
def test_no_split_has_a_cheaper_worst_stage(layers, stages, extras):
    cost = PartCosts(embedding=extras[0], head=extras[1])
    split = balance(layers, stages, cost=cost)
    assert split in set(splits(layers, stages))
    assert max(cost.of_stages(split)) == min(max(cost.of_stages(other)) for other in splits(layers, stages))


def test_equal_parts_differ_by_one_block_at_most_and_early_stages_are_the_short_ones():
    assert balance(12, 4) == (3, 3, 3, 3)
    assert balance(10, 4) == (2, 2, 3, 3)


def test_short_stages_are_spread_over_ranks():
    """72 blocks over 48 stages: 24 of two; each of 8 ranks gets three of them, on a V too."""
    for placement, stages in (("loop", 48), ("v", 16)):
        split = balance(stages * 3 // 2, stages, ranks=8, placement=placement)
        assert set(split) == {1, 2}
        assert rank_totals(split, ranks=8, placement=placement) == [stages * 3 // 16] * 8


def test_of_equal_stages_the_one_on_the_idler_rank_gets_the_block():
    """On a V rank 3 holds stages 3 and 4: once one of them has two blocks, stage 0 beside the head is the next."""
    cost = PartCosts(head=1.5)
    split = balance(11, 8, cost=cost, ranks=4, placement="v")
    assert split == (2, 1, 1, 1, 2, 2, 2, 0)
    assert rank_totals(cost.of_stages(split), ranks=4, placement="v") == [3.5, 3.0, 3.0, 3.0]


def test_94_blocks_over_48_stages():
    """A head as costly as 1.3 blocks takes the place of the last stage's two."""
    model = ModelConfig.model_validate(PANGU)
    split = split_layers(model, 48, seq_len=4096, ranks=8)
    assert split == (2,) * 47 + (0,)
    assert rank_totals(split, ranks=8) == [12] * 7 + [10]
    by_rank = rank_totals(costs(model, 4096).of_stages(split), ranks=8)
    assert max(by_rank) / min(by_rank) == pytest.approx(12 / 11.3139, rel=1e-4)
    assert sorted(balance(94, 48, ranks=8)) == [1] * 2 + [2] * 46


@pytest.mark.parametrize("heads", [0, 2])
@pytest.mark.parametrize("ffn", [{"hidden": 96}, {"kind": "moe", "hidden": 48, "experts": 6, "top_k": 2}])
def test_costs_add_up_to_the_flops_of_a_token(ffn, heads):
    model = ModelConfig.model_validate(
        {"vocab_size": 1000, "hidden": 64, "layers": 5, "attention": {"heads": 4, "kv_heads": 2}, "ffn": ffn, "mtp": {"heads": heads}}
    )
    c = costs(model, 32)
    assert 5 * c.block + c.embedding + c.head + c.mtp == pytest.approx(flops_per_token(model, 32))
    assert c.head == pytest.approx(6 * 1000 * 64)
    assert c.mtp == pytest.approx(heads * (c.block + 6 * 2 * 64 * 64 + c.head))
    projections = 64 * 64 * 2 + 64 * 32 * 2 + (3 * 64 * 96 if "kind" not in ffn else 64 * 6 + 2 * 3 * 64 * 48)
    assert c.block == pytest.approx(6 * projections + 12 * 64 * 16.5)


def test_dense_layers_before_experts_count_as_what_they_are():
    ffn = {"kind": "moe", "hidden": 48, "experts": 6, "top_k": 2, "shared_experts": 1, "dense_layers": 2, "dense_hidden": 500}
    latent = {"kind": "mla", "heads": 4, "kv_rank": 16, "nope_dim": 8, "rope_dim": 4, "value_dim": 8}
    shape = {"vocab_size": 1000, "hidden": 64, "layers": 5, "attention": latent, "mtp": {"heads": 1}}
    model = ModelConfig.model_validate(shape | {"ffn": ffn})
    c = costs(model, 32)
    dense, other = (
        costs(ModelConfig.model_validate(shape | {"ffn": one}), 32).block for one in ({"hidden": 500}, ffn | {"dense_layers": 0})
    )
    assert c.blocks == (dense, dense, other, other, other) and c.block == pytest.approx((2 * dense + 3 * other) / 5)
    assert c.of_stages((1, 2, 0, 2)) == pytest.approx((dense, dense + other, 0, 2 * other + c.head + c.mtp))
    assert sum(c.of_stages((1, 2, 0, 2))) == pytest.approx(flops_per_token(model, 32))
    assert c.mtp == pytest.approx(other + 6 * 2 * 64 * 64 + c.head)


def test_61_blocks_of_pangu_ultra_moe_over_32_stages():
    """Dense blocks cost what those with experts do but for the router; two passes of the head and the block ahead cost 4.5 of them."""
    model = ModelConfig.model_validate({"preset": "pangu_ultra_moe_718b", "mtp": {"heads": 1}})
    c = costs(model, 4096)
    assert c.blocks[2] / c.blocks[3] == pytest.approx(1, abs=0.003) and (c.head + c.mtp) / c.block == pytest.approx(4.5, abs=0.01)
    split = split_layers(model, 32, seq_len=4096, ranks=16)
    assert split == (*[2] * 15, 1, *[2] * 15, 0)
    assert rank_totals(split, ranks=16) == [4] * 15 + [1]


def test_multi_token_prediction_counts_with_the_last_stage():
    model = ModelConfig.model_validate({**PANGU, "mtp": {"heads": 1}})
    split = split_layers(model, 8, seq_len=4096)
    extra = (costs(model, 4096).head + costs(model, 4096).mtp) / costs(model, 4096).block
    assert 3.8 < extra < 3.9
    assert split[-1] == 9 and set(split[:-1]) == {12, 13} and sum(split) == 94


def test_a_given_list_is_taken():
    model = ModelConfig.model_validate(PANGU)
    given = [12] * 7 + [10]
    assert split_layers(model, 8, seq_len=4096, given=given) == tuple(given)
    assert check_layers([0, 3, 0], layers=3, stages=3) == (0, 3, 0)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ([3, 3], r"has 2 entries.*3 stages"),
        ([3, 3, 3], r"3 \+ 3 \+ 3 = 9, but model\.layers is 8"),
        ([4, 0, 4], r"stages \[1\] hold no block"),
        ([9, 1, -2], r"stages \[2\]"),
    ],
)
def test_a_list_that_does_not_fit_is_refused_with_the_arithmetic(given, says):
    with pytest.raises(UserError, match=rf"parallel\.layers_per_stage.*{says}"):
        check_layers(given, layers=8, stages=3)


def test_too_few_blocks_are_refused():
    assert balance(10, 12, ranks=4) == (0, *[1] * 10, 0)
    with pytest.raises(UserError, match=r"model\.layers 9.*4 x 3.*the first and the last, 10, need a block"):
        balance(9, 12, ranks=4)
