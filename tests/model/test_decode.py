"""Generation with slots of unequal length against whole passes over each sequence alone."""

import math
import random
from dataclasses import replace

import pytest
import torch

from llmtrain.errors import UserError
from llmtrain.model.cache import SlotCache, cache_bytes
from llmtrain.model.decode import CachedRunner, Decoder, UncachedRunner, generate
from llmtrain.model.sampling import Sampling
from llmtrain.ops import Mask

LATENT = {"kind": "mla", "heads": 4, "query_rank": 12, "kv_rank": 16, "nope_dim": 8, "rope_dim": 4, "value_dim": 6}
MODELS = {
    "gqa": {},
    "window": {"attention": {"heads": 4, "kv_heads": 2, "window": 5}},
    "qk_norm": {"attention": {"heads": 4, "kv_heads": 1, "qk_norm": True}, "norm": {"placement": "sandwich"}},
    "learned": {"position": {"kind": "learned"}, "norm": {"kind": "layer_norm"}, "ffn": {"hidden": 40, "activation": "gelu"}},
    "latent": {
        "attention": LATENT,
        "ffn": {"kind": "moe", "experts": 4, "hidden": 24, "shared_experts": 1, "router": {"score": "sigmoid"}},
    },
    "latent, wide values, window": {"attention": LATENT | {"value_dim": 20, "query_rank": None, "window": 5}},
}
RULES = {
    "greedy": Sampling(max_new=12, temperature=0),
    "nucleus": Sampling(max_new=12, temperature=0.9, top_p=0.9, seed=5),
    "stops": Sampling(max_new=12, temperature=1.2, seed=8, stop_ids=tuple(range(12))),
}
LENGTHS = (1, 5, 30, 2, 2, 17, 9, 1)


@pytest.fixture
def prompts():
    draw = random.Random(0)
    return [[draw.randrange(61) for _ in range(n)] for n in LENGTHS]


def alone(model, prompt, rule):
    """One sequence by whole passes, without any cache, batch or padding."""

    @torch.no_grad()
    def logits(tokens):
        return model(tokens, mask=Mask())["logits"]

    return generate(UncachedRunner(logits, slots=1, capacity=64), [prompt], rule, logprobs=True)[0]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", MODELS)
def test_a_batch_gives_what_each_gives_alone(name, rule, make_model, prompts):
    """Greedy and drawn, with sequences that end early and others that take their slots."""
    _, model = make_model(MODELS[name])
    rules = [replace(RULES[rule], seed=RULES[rule].seed + i) for i in range(len(prompts))]
    rows = generate(CachedRunner(model, slots=3, capacity=42), prompts, rules, logprobs=True)
    ends = set()
    for row, prompt, own in zip(rows, prompts, rules, strict=True):
        expected = alone(model, prompt, own)
        assert (row.tokens, row.finished) == (expected.tokens, expected.finished)
        assert row.logprobs == pytest.approx(expected.logprobs, abs=1e-10)
        ends.add(len(row.new))
    assert rule != "stops" or (len(ends) > 2), "rows must end at different steps for the test to mean something"


@pytest.mark.parametrize("name", MODELS)
def test_prompts_of_equal_length_begin_in_one_pass(name, make_model, prompts):
    _, model = make_model(MODELS[name])
    equal = [prompts[2][i : i + 6] for i in range(3)]
    runner, passes = CachedRunner(model, slots=3, capacity=42), []
    model.register_forward_hook(lambda module, args, out: passes.append(args[0].shape))
    rows = generate(runner, equal, RULES["nucleus"], logprobs=True)
    assert passes == [(3, 6)] + [(3, 1)] * 11
    for row, prompt in zip(rows, equal):
        expected = alone(model, prompt, RULES["nucleus"])
        assert row.tokens == expected.tokens and row.logprobs == pytest.approx(expected.logprobs, abs=1e-10)


def test_right_padding_in_an_uncached_batch_changes_nothing(make_model, prompts):
    _, model = make_model()

    @torch.no_grad()
    def logits(tokens):
        return model(tokens, mask=Mask())["logits"]

    rows = generate(UncachedRunner(logits, slots=8, capacity=64), prompts, RULES["nucleus"])
    assert [row.tokens for row in rows] == [alone(model, prompt, RULES["nucleus"]).tokens for prompt in prompts]


def test_log_probabilities_are_the_models(make_model, prompts):
    _, model = make_model()
    row = generate(CachedRunner(model, slots=1, capacity=64), [prompts[1]], RULES["nucleus"], logprobs=True)[0]
    with torch.no_grad():
        logs = model(torch.tensor([row.tokens]), mask=Mask())["logits"][0].log_softmax(-1)
    expected = [logs[i - 1, row.tokens[i]].item() for i in range(row.prompt, len(row.tokens))]
    assert row.logprobs == pytest.approx(expected, abs=1e-10)


def test_text_put_in_amid_generation(make_model, prompts):
    """The neighbours go on as if nothing had happened; the row goes on from the inserted tokens."""
    _, model = make_model()
    greedy = Sampling(max_new=20, temperature=0)
    decoder = Decoder(CachedRunner(model, slots=4, capacity=64), logprobs=True)
    rows = [decoder.add(prompt, greedy) for prompt in prompts[:4]]
    for _ in range(3):
        decoder.step()
    decoder.insert(rows[1], [7, 8, 9, 10])
    decoder.insert(rows[3], [11])
    begins = {1: list(rows[1].tokens), 3: list(rows[3].tokens)}
    decoder.run()
    for index, begin in begins.items():
        inserted = len(begin) - 3 - len(prompts[index])
        expected = alone(model, begin, Sampling(max_new=20 - 3 - inserted, temperature=0))
        assert rows[index].tokens == expected.tokens and len(rows[index].new) == 20
        assert rows[index].logprobs[3 + inserted :] == pytest.approx(expected.logprobs, abs=1e-10)
        assert all(math.isnan(x) for x in rows[index].logprobs[3 : 3 + inserted])
    for index in (0, 2):
        assert rows[index].tokens == alone(model, prompts[index], greedy).tokens
    with pytest.raises(ValueError, match="has ended"):
        decoder.insert(rows[1], [1])


def test_a_row_ended_from_outside_leaves_its_slot(make_model, prompts):
    _, model = make_model()
    greedy = RULES["greedy"]
    decoder = Decoder(CachedRunner(model, slots=2, capacity=64))
    rows = [decoder.add(prompt, greedy) for prompt in prompts[:5]]
    decoder.step()
    decoder.end(rows[0], "closed")
    decoder.end(rows[4], "closed")
    decoder.run()
    assert [row.finished for row in rows] == ["closed", "length", "length", "length", "closed"]
    assert len(rows[0].new) == 1 and rows[4].new == []
    assert [row.tokens for row in rows[1:4]] == [alone(model, prompt, greedy).tokens for prompt in prompts[1:4]]


def test_what_does_not_fit(make_model):
    _, model = make_model()
    runner = CachedRunner(model, slots=1, capacity=10)
    with pytest.raises(UserError, match="prompt of 6 tokens and max_new 5 exceed the cache's 10"):
        Decoder(runner).add([1] * 6, Sampling(max_new=5))
    with pytest.raises(UserError, match="prompt is empty"):
        Decoder(runner).add([], Sampling())
    assert generate(runner, [[1, 2]], Sampling(max_new=0))[0].tokens == [1, 2]
    with pytest.raises(ValueError, match="10 tokens per slot and 11"):
        model(torch.tensor([[1] * 11]), mask=Mask(), cache=SlotCache(1, 10).fill(0, 1))


def test_the_cache_is_as_large_as_it_says(make_model):
    cfg, model = make_model()
    runner = CachedRunner(model, slots=3, capacity=20)
    generate(runner, [[1, 2], [3], [4, 5, 6]], Sampling(max_new=3))
    assert runner.cache.nbytes == cache_bytes(cfg, slots=3, capacity=20, itemsize=8) == 2 * 3 * 3 * 20 * 2 * 8 * 8


def test_the_last_logits_alone(make_model, tokens):
    _, model = make_model()
    with torch.no_grad():
        whole = model(tokens, mask=Mask())["logits"]
        torch.testing.assert_close(model(tokens, mask=Mask(), last=3)["logits"], whole[:, -3:])
        assert model(tokens, mask=Mask(), last=0)["logits"].shape == (2, 0, 61)
