"""Two gradients that are wrong in megatron-core's own latent attention under tensor parallelism, but not in ours (docs/megatron.md)."""

from importlib.util import find_spec

import numpy as np
import pytest
import worlds

from llmtrain.packages import installed_version

pytestmark = pytest.mark.skipif(installed_version("megatron-core") is None, reason="megatron-core is not installed; make test-engines")
CASES = {
    "plain": {},
    "sequence": {"sequence_parallel": True},
    "ours": {"sequence_parallel": True, "ours": True},
    "half": {"deaf": 2},
}
"""`half` is of use in one process: the rotated key gets its gradient from the last two of four heads."""
LATENT = 10
"""Rows of linear_kv_down_proj that make the latent vector; those after them make the rotated key."""
QUERY_NORM, KEY_ROWS = (f"decoder.layers.0.self_attention.{name}.weight" for name in ("q_layernorm", "linear_kv_down_proj"))
BELOW = {"embedding.word_embeddings.weight", "decoder.layers.0.input_layernorm.weight"}
"""What gets the error that those rows pass down."""


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict[str, dict]]:
    """Gradients on two ranks and on one, by case."""
    return [
        worlds.run_world(
            "megatron_latent:gradients",
            ranks,
            args={"cases": CASES},
            folder=tmp_path_factory.mktemp(f"ranks{ranks}"),
            fresh=find_spec("deepspeed") is not None,
        )
        for ranks in (2, 1)
    ]


def off(two: np.ndarray, one: np.ndarray) -> float:
    """The difference relative to the norm of what one process has."""
    return float(np.linalg.norm(two - one) / np.linalg.norm(one))


def wrong(two: dict, one: dict) -> set[str]:
    assert two.keys() == one.keys()
    found = {name: off(two[name], one[name]) for name in one}
    print({name: f"{value:.1e}" for name, value in found.items()})
    return {name for name, value in found.items() if value > 3e-6}


def test_the_norm_of_queries_is_doubled(found):
    two, one = (cases["plain"] for cases in found)
    assert wrong(two, one) == {QUERY_NORM, KEY_ROWS} | BELOW
    assert off(two[QUERY_NORM], 2.0 * one[QUERY_NORM]) < 1e-5
    two, one = (cases["sequence"] for cases in found)
    assert QUERY_NORM not in wrong(two, one), "under sequence parallelism the sum over ranks is right"


@pytest.mark.parametrize("case", ["plain", "sequence"])
def test_the_rotated_key_misses_the_heads_of_other_ranks(case, found):
    two, one = (cases[case] for cases in found)
    assert off(two[KEY_ROWS][:LATENT], one[KEY_ROWS][:LATENT]) < 1e-5
    assert off(two[KEY_ROWS][LATENT:], one[KEY_ROWS][LATENT:]) > 0.3
    assert wrong(two, one) - {QUERY_NORM} == {KEY_ROWS} | BELOW
    half = found[1]["half"]
    assert wrong(two, half) - {QUERY_NORM} == set(), "what is there is the part of the heads of the rank that holds the rows"


def test_the_engines_latent_attention_has_neither_error(found):
    two, one = (cases["ours"] for cases in found)
    assert wrong(two, one) == set()
    assert wrong(one, found[1]["plain"]) == set(), "in one process they are the same model"
