"""Drawing tokens: the rules against their definitions."""

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtrain.errors import UserError
from llmtrain.model import sampling
from llmtrain.model.sampling import Sampler, Sampling, draw


def shares(probabilities, count=4000, **rule):
    """Share of each token over many draws of one sampler."""
    sampler = Sampler(Sampling(**{"temperature": 1.0, "seed": 0} | rule))
    logits = torch.tensor(probabilities, dtype=torch.float64).log()
    drawn = Counter(sampler.draw(logits) for _ in range(count))
    return [drawn[i] / count for i in range(len(probabilities))]


def test_temperature_and_cuts():
    p = [0.15, 0.5, 0.05, 0.3]
    assert shares(p) == pytest.approx(p, abs=0.03)
    assert shares(p, top_p=0.7) == pytest.approx([0, 0.5 / 0.8, 0, 0.3 / 0.8], abs=0.03)
    assert shares(p, top_p=0.01) == [0, 1, 0, 0]
    assert shares(p, top_k=3) == pytest.approx([0.15 / 0.95, 0.5 / 0.95, 0, 0.3 / 0.95], abs=0.03)
    assert shares(p, top_k=3, top_p=0.5) == [0, 1, 0, 0]
    cold = [x * x for x in p]
    assert shares(p, temperature=0.5) == pytest.approx([x / sum(cold) for x in cold], abs=0.03)


@settings(max_examples=60, deadline=None)
@given(
    logits=st.lists(st.sampled_from([-2.0, -1.0, 0.0, 0.5, 0.5, 3.0]), min_size=1, max_size=40),
    top_p=st.sampled_from([0.2, 0.6, 0.9, 0.999]),
    top_k=st.integers(0, 6),
)
def test_the_nucleus_found_among_few_candidates_is_that_of_the_whole_vocabulary(logits, top_p, top_k):
    """Also where tokens are equally likely, at the border of the candidates too."""
    probabilities = torch.tensor(logits, dtype=torch.float64).softmax(-1)
    order = sorted(range(len(logits)), key=lambda i: (-probabilities[i].item(), i))
    running, expected = 0.0, []
    for i in order:
        if running >= top_p - 1e-12 or (top_k and len(expected) == top_k):
            break
        expected.append(i)
        running += probabilities[i].item()
    before, sampling.CANDIDATES = sampling.CANDIDATES, 4
    try:
        _, ids = sampling._nucleus(probabilities, top_p=top_p - 1e-12, top_k=top_k)
    finally:
        sampling.CANDIDATES = before
    assert ids.tolist() == expected


def test_a_rows_numbers_do_not_depend_on_its_neighbours():
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(1))
    rules = [Sampling(temperature=1.0, seed=3), Sampling(temperature=0), Sampling(temperature=2.0, seed=4, top_p=0.8)]
    together = [draw(logits, samplers) for samplers in [[Sampler(r) for r in rules]] for _ in range(5)]
    for index, rule in enumerate(rules):
        sampler = Sampler(rule)
        assert [draw(logits[index : index + 1], [sampler])[0] for _ in range(5)] == [row[index] for row in together]
    assert len({tuple(draw(logits.expand(3, 3, 50)[0], [Sampler(Sampling(temperature=1.0, seed=s))] * 3)) for s in range(8)}) > 1


def test_greedy_takes_the_first_of_equals():
    assert draw(torch.tensor([[1.0, 5.0, 5.0], [2.0, 2.0, 2.0]]), [Sampler(Sampling(temperature=0))] * 2) == [1, 0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_not_finite(bad):
    with pytest.raises(UserError, match="not finite"):
        draw(torch.tensor([[0.0, 1.0], [bad, 0.0]]), [Sampler(Sampling())] * 2)
    assert draw(torch.tensor([[float("-inf"), 1.0]]), [Sampler(Sampling())]) == [1]


@pytest.mark.parametrize("wrong", [{"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}, {"top_k": -1}, {"max_new": -1}])
def test_values_that_mean_nothing(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        Sampling(**wrong)
