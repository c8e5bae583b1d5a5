"""Initial weights: the papers' numbers, and the same numbers however the model is sharded."""

import math

import numpy as np
import pytest
import torch
from init_world import whole_model
from worlds import run_world

from llmtrain.config.model import ModelConfig
from llmtrain.model import canonical_name, initialise, measure_branch_std, set_post_norm_gamma
from llmtrain.model.draw import BLOCK, normals
from llmtrain.model.init import matrix_std, post_norm_gamma
from llmtrain.ops import Mask

PANGU = ModelConfig.model_validate({"preset": "pangu_ultra_135b"})
# No dim is a multiple of the number of ranks, some are smaller than a rank's share would be, and one tensor spans several drawn blocks.
UNEVEN = {
    "vocab_size": 5003,
    "layers": 2,
    "hidden": 36,
    "attention": {"heads": 3, "kv_heads": 1, "qkv_bias": True, "qk_norm": True},
    "ffn": {"hidden": 37},
    "norm": {"placement": "depth_scaled_sandwich"},
}


def test_the_papers_numbers():
    assert post_norm_gamma(PANGU, "attention") == pytest.approx(0.02919, abs=5e-6)
    assert post_norm_gamma(PANGU, "ffn") == pytest.approx(0.04456, abs=5e-6)
    for name in ("blocks.0.attention.q_proj.weight", "blocks.93.ffn.down_proj.weight", "head.weight"):
        assert matrix_std(PANGU, name) == pytest.approx(6.579e-4, rel=1e-4)
    assert matrix_std(PANGU, "embedding.weight") == 0.5


def test_small_and_normal_init():
    small = PANGU.model_copy(update={"init": PANGU.init.model_copy(update={"kind": "small", "embedding_std": None})})
    assert matrix_std(small, "blocks.0.attention.q_proj.weight") == pytest.approx(5.71e-3, rel=1e-3)
    assert matrix_std(small, "blocks.0.ffn.down_proj.weight") == pytest.approx(5.88e-4, rel=2e-3)
    assert matrix_std(small, "embedding.weight") == math.sqrt(2 / (5 * 12_288))
    normal = ModelConfig.model_validate({"layers": 8, "init": {"std": 0.02}})
    assert matrix_std(normal, "blocks.7.attention.k_proj.weight") == matrix_std(normal, "embedding.weight") == 0.02
    assert matrix_std(normal, "blocks.7.attention.out_proj.weight") == matrix_std(normal, "blocks.0.ffn.down_proj.weight") == 0.005


def test_gammas_biases_and_stds_arrive_in_the_model():
    weights = whole_model(UNEVEN, 1)
    cfg = ModelConfig.model_validate(UNEVEN)
    for name, tensor in weights.items():
        if name.endswith(".bias"):
            assert (tensor == 0).all()
        elif "post_" in name:
            torch.testing.assert_close(tensor, torch.full_like(tensor, (0.283 if "attention" in name else 0.432) / math.sqrt(2)))
        elif tensor.ndim == 1:
            assert (tensor == 1).all(), name
        else:
            assert tensor.std().item() == pytest.approx(matrix_std(cfg, name), rel=5 / math.sqrt(tensor.numel())), name


def test_seed_and_name_decide():
    first, again, other = whole_model(UNEVEN, 1), whole_model(UNEVEN, 1), whole_model(UNEVEN, 2)
    matrices = [name for name, tensor in first.items() if tensor.ndim > 1]
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any((first[name] == other[name]).any() for name in matrices if first[name].numel() < 5000)
    stacked = torch.stack([first[name].flatten()[:400] for name in matrices])
    correlation = torch.corrcoef(stacked).fill_diagonal_(0).abs().max()
    assert correlation < 5 / math.sqrt(400), "tensors of different names are related"


def test_element_i_of_the_model_is_number_i_of_its_name():
    cfg, weights = ModelConfig.model_validate(UNEVEN), whole_model(UNEVEN, 5)
    for name in ("embedding.weight", "blocks.1.ffn.down_proj.weight"):
        expected = normals(5, name, 0, weights[name].numel()) * matrix_std(cfg, name)
        assert torch.equal(weights[name].flatten(), torch.from_numpy(expected).float())


def test_shards_hold_the_same_numbers(tmp_path):
    whole = whole_model(UNEVEN, 7)
    for how, sharded in run_world("init_world:sharded_models", 2, args={"values": UNEVEN, "seed": 7}, folder=tmp_path).items():
        assert whole.keys() - sharded.keys() == ({"head.weight"} if "tied" in how else set())
        for name, tensor in sharded.items():
            assert torch.equal(tensor, whole[name]), f"{name} sharded by {how}"


def test_the_numbers_never_change():
    """A run of last year must be repeatable."""
    assert normals(1, "embedding.weight", 0, 3) == pytest.approx([-1.05260535069054, 0.9872982461773693, -0.5343352913324098], rel=1e-12)
    assert normals(1, "embedding.weight", 10**9, 10**9 + 1) == pytest.approx([-0.8648426972715488], rel=1e-12)


SLICES = [(0, 1), (5, 6), (1, BLOCK), (BLOCK - 3, BLOCK + 3), (BLOCK, 2 * BLOCK), (3 * BLOCK - 1, 3 * BLOCK)]


@pytest.mark.parametrize(("start", "stop"), SLICES)
def test_a_slice_equals_the_whole(start, stop):
    assert np.array_equal(normals(4, "a", start, stop), normals(4, "a", 0, 3 * BLOCK)[start:stop])


def test_the_numbers_are_standard_normal():
    """Moments and tails of a million numbers within five standard errors."""
    n = 1 << 20
    x = normals(11, "embedding.weight", 0, n)
    assert abs(x.mean()) < 5 / math.sqrt(n)
    assert abs(x.var() - 1) < 5 * math.sqrt(2 / n)
    assert abs((x**3).mean()) < 5 * math.sqrt(15 / n)
    assert abs((x**4).mean() - 3) < 5 * math.sqrt(96 / n)
    for bound in (0.5, 1.0, 2.0, 3.0, 4.0):
        expected = math.erfc(bound / math.sqrt(2))
        assert abs((np.abs(x) > bound).mean() - expected) < 5 * math.sqrt(expected / n), bound
    lagged = max(abs((x[:-lag] * x[lag:]).mean()) for lag in (1, 2, 4, 36, 576))
    assert lagged < 5 / math.sqrt(n)


def test_different_names_and_seeds_are_independent():
    n = 1 << 18
    draws = [normals(seed, name, 0, n) for seed, name in ((1, "a"), (1, "b"), (2, "a"), (1, "2a"), (12, "a"))]
    correlation = np.corrcoef(draws) - np.eye(len(draws))
    assert np.abs(correlation).max() < 5 / math.sqrt(n)


def test_meta_parameters_and_wrapped_names(make_model):
    cfg, model = make_model()
    assert canonical_name("blocks.0._checkpoint_wrapped_module._orig_mod.ffn.up_proj.weight") == "blocks.0.ffn.up_proj.weight"
    with pytest.raises(ValueError, match=r"embedding.weight is on the meta device.*to_empty"):
        initialise(model.to("meta"), cfg, 0)


def test_measured_branch_std_gives_unit_gammas(make_model, tokens):
    """By Pangu Ultra's definition c is the branch's output std; checked by computing the branches by hand."""
    cfg, model = make_model({"norm": {"placement": "depth_scaled_sandwich", "c_attention": "auto", "c_ffn": "auto"}})
    assert post_norm_gamma(cfg, "attention") == post_norm_gamma(cfg, "ffn") == 1 / math.sqrt(3)
    attention, ffn = measure_branch_std(model, lambda: model(tokens, mask=Mask()))
    with torch.no_grad():
        x, stds = model.embedding(tokens), []
        rope = model.rope(torch.arange(24)[None], torch.float64)
        for block in model.blocks.values():
            branch = block.attention(block.attention_norm(x), rope=rope, mask=Mask())
            x = x + block.post_attention_norm(branch)
            second = block.ffn(block.ffn_norm(x))
            x = x + block.post_ffn_norm(second)
            stds.append((branch.std().item(), second.std().item()))
    assert (attention, ffn) == pytest.approx(tuple(np.mean(stds, axis=0)), rel=1e-12)
    assert not any(module._forward_pre_hooks for module in model.modules())
    set_post_norm_gamma(model, attention, ffn)
    for block in model.blocks.values():
        assert (block.post_attention_norm.weight == attention / math.sqrt(3)).all()
        assert (block.post_ffn_norm.weight == ffn / math.sqrt(3)).all()


def test_measuring_says_what_it_lacks(make_model):
    _, model = make_model({"norm": {"placement": "depth_scaled_sandwich"}})
    with pytest.raises(ValueError, match="did not forward"):
        measure_branch_std(model, lambda: None)
    _, model = make_model()
    with pytest.raises(ValueError, match=r"depth_scaled_sandwich"):
        measure_branch_std(model, lambda: None)
    with pytest.raises(ValueError, match=r"depth_scaled_sandwich"):
        set_post_norm_gamma(model, 1.0, 1.0)
