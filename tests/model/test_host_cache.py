"""Blocks whose keys and values lie on the host: the same tokens, nothing computed across the two, and few bytes per token."""

import random

import pytest
import torch
from two_places import DEVICE, HOST, LateCopies, TwoPlaces

from llmtrain.compat import memory_of
from llmtrain.model.decode import CachedRunner, Decoder
from llmtrain.model.host_cache import HostBlocks
from llmtrain.model.sampling import Sampling
from llmtrain.ops import Call, Ops, choose

LATENT = {"kind": "mla", "heads": 4, "query_rank": 12, "kv_rank": 16, "nope_dim": 8, "rope_dim": 4, "value_dim": 6}
MODELS = {
    "gqa": {},
    "window": {"attention": {"heads": 4, "kv_heads": 2, "window": 5}},
    "learned": {"position": {"kind": "learned"}, "norm": {"kind": "layer_norm"}, "ffn": {"hidden": 40, "activation": "gelu"}},
    "latent": {"attention": LATENT, "ffn": {"kind": "moe", "experts": 4, "hidden": 24}},
}


def decode(model, prompts, *, host=None) -> list[tuple]:
    """Tokens and their log-probabilities; two sequences at a time, text put in amid one of them."""
    decoder = Decoder(CachedRunner(model, slots=2, capacity=40, host=host), logprobs=True)
    rows = [decoder.add(prompt, Sampling(max_new=9 + 2 * i, temperature=0.9, seed=i)) for i, prompt in enumerate(prompts)]
    for step in range(100):
        if step == 4:
            decoder.insert(rows[0], [7, 8, 9])
        if not decoder.step():
            break
    return [(row.tokens, [f"{chance:.17g}" for chance in row.logprobs]) for row in rows]


def blocks(cfg, names, copies, dtype=torch.float64) -> HostBlocks:
    call = Call(device="cpu", dtype=dtype, backward=False, head_dim=cfg.head_dim, value_head_dim=cfg.value_head_dim, offsets=True)
    return HostBlocks(names, copies=copies, ops=Ops({op: choose(op, call) for op in ("attention", "decode_attention")}))


@pytest.mark.parametrize("names", [["0"], ["0", "1", "2"]], ids=len)
@pytest.mark.parametrize("name", MODELS)
def test_tokens_are_the_same(name, names, make_model):
    """To the last bit, as on one CPU both places compute alike. Slots move, unequal prompts wait, text is put in amid generation."""
    draw = random.Random(0)
    prompts = [[draw.randrange(61) for _ in range(length)] for length in (3, 17, 9, 1, 5)]
    cfg, model = make_model(MODELS[name])
    expected = decode(model, prompts)
    with TwoPlaces(*model.parameters(), *model.buffers()) as places:
        copies = LateCopies(places)
        found = decode(model, prompts, host=blocks(cfg, names, copies))
    assert found == expected
    assert {place for place, _ in copies.made} == {HOST, DEVICE}


def test_a_token_costs_two_copies_per_block(make_model):
    cfg, model = make_model()
    with torch.inference_mode(), TwoPlaces(*model.parameters(), *model.buffers()) as places:
        copies = LateCopies(places)
        runner = CachedRunner(model, slots=2, capacity=20, host=blocks(cfg, ["0", "1"], copies))
        rows = [[1, 2, 3, 4], [5, 6, 7, 8]]
        runner.begin(rows)
        width, token = cfg.head_dim, 8 * 2  # two rows of float64
        keys = 4 * token * cfg.kv_heads * width
        assert copies.made == [(HOST, keys)] * 4, "keys and values of two blocks"
        copies.made.clear()
        runner.step([[*row, 9] for row in rows])
        step = [(HOST, token * width * (4 + 2 * cfg.kv_heads)), (DEVICE, token * width * 4)]
        assert copies.made == 2 * step
        buffers = [runner.cache.buffers(block, None, None)[0] for block in "012"]
    assert [places.where[memory_of(buffer)] for buffer in buffers] == [HOST, HOST, DEVICE]


def test_mixing_the_two_is_seen(make_model):
    """The check can fail: with keys and values taken for the host's that are the device's."""
    cfg, model = make_model()
    with TwoPlaces(*model.parameters(), *model.buffers()) as places:
        host = blocks(cfg, ["1"], LateCopies(places))
        host.compute = lambda attend, q, k, v: attend(q, k, v)
        with pytest.raises(AssertionError, match="mixes tensors"):
            decode(model, [[1, 2, 3], [4, 5]], host=host)
