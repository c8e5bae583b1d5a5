"""RoPE frequencies against transformers' and against the closed forms."""

import math

import pytest
import torch

from llmtrain.config.model import Llama3RopeConfig, NTKConfig, PositionConfig, YarnConfig
from llmtrain.model.rope import Rope, attention_factor, inverse_frequencies

YARN = [
    YarnConfig(factor=4, original_seq_len=4096),
    YarnConfig(factor=16, original_seq_len=2048, beta_fast=16, beta_slow=2),
    YarnConfig(factor=40, original_seq_len=64),
]
LLAMA3 = [Llama3RopeConfig(), Llama3RopeConfig(factor=32, low_freq_factor=2, high_freq_factor=8, original_seq_len=512)]
SCALINGS = [None, *YARN, *LLAMA3]


def theirs(scaling, base: float, head_dim: int):
    """(inverse frequencies, factor on cos and sin) that transformers computes from the config.json we would write."""
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    from llmtrain.config.model import ModelConfig
    from llmtrain.convert.hf_config import hf_config

    position = {"base": base, "scaling": scaling and scaling.model_dump()}
    cfg = ModelConfig.model_validate(
        {"vocab_size": 8, "hidden": head_dim, "attention": {"heads": 1, "head_dim": head_dim}, "position": position}
    )
    config = transformers.LlamaConfig(**hf_config(cfg, "llama"))
    kind = config.rope_parameters["rope_type"]
    compute = ROPE_INIT_FUNCTIONS.get(kind, LlamaRotaryEmbedding.compute_default_rope_parameters)
    return compute(config, device=torch.device("cpu"))


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("base", [10_000.0, 500_000.0])
@pytest.mark.parametrize("scaling", SCALINGS, ids=str)
def test_frequencies_equal_transformers(scaling, base, head_dim):
    expected, factor = theirs(scaling, base, head_dim)
    torch.testing.assert_close(inverse_frequencies(base, head_dim, scaling).float(), expected, rtol=1e-5, atol=1e-10)
    assert attention_factor(scaling) == pytest.approx(factor, rel=1e-12)


@pytest.mark.parametrize("factor", [1.0, 4.0, 8.0])
def test_ntk_equals_a_larger_base(factor):
    """Also what transformers' dynamic NTK arrives at for a sequence of this many times the original length."""
    d, base = 128, 10_000.0
    got = inverse_frequencies(base, d, NTKConfig(factor=factor))
    plain = inverse_frequencies(base, d)
    expected, _ = theirs(NTKConfig(factor=factor), base, d)
    torch.testing.assert_close(got.float(), expected, rtol=1e-5, atol=1e-10)
    assert got[0] == plain[0] == 1
    assert (plain[-1] / got[-1]).item() == pytest.approx(factor, rel=1e-12)


def test_yarn_by_its_formula():
    """arXiv 2309.00071: the pair that turns more than beta_fast times is kept, fewer than beta_slow times is divided by the factor."""
    d, base, cfg = 128, 10_000.0, YARN[0]
    ratio = inverse_frequencies(base, d, cfg) / inverse_frequencies(base, d)
    turns = cfg.original_seq_len * inverse_frequencies(base, d) / (2 * math.pi)
    assert (ratio[turns > 40] == 1).all()
    torch.testing.assert_close(ratio[turns < 0.8], torch.full_like(ratio[turns < 0.8], 1 / 4))
    assert (ratio.diff() <= 1e-15).all() and attention_factor(cfg) == 0.1 * math.log(4) + 1


def test_tables_are_those_of_the_positions():
    rope = Rope(PositionConfig(base=100.0, scaling=YARN[0]), 8)
    positions = torch.tensor([[0, 5, 2], [7, 7, 0]])
    cos, sin = rope(positions, torch.float64)
    angles = positions[..., None] * inverse_frequencies(100.0, 8, YARN[0])
    factor = attention_factor(YARN[0])
    torch.testing.assert_close(cos, (angles.cos() * factor).repeat(1, 1, 2)[:, None])
    torch.testing.assert_close(sin, (angles.sin() * factor).repeat(1, 1, 2)[:, None])
    assert rope(positions, torch.bfloat16)[0].dtype == torch.bfloat16
    # Angles are not rounded to 16 bits before the cosine: at position 40000 that would leave nothing of it.
    far = torch.tensor([[40_000]])
    torch.testing.assert_close(rope(far, torch.bfloat16)[0].double(), rope(far, torch.float64)[0], atol=0.01, rtol=0.01)


def test_nothing_is_stored_in_the_model():
    rope = Rope(PositionConfig(), 64)
    rope(torch.arange(4)[None], torch.float32)
    assert not list(rope.parameters()) and not list(rope.buffers()) and not rope.state_dict()
