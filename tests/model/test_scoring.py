"""Log-probabilities of continuations and windows against whole passes."""

import pytest
import torch

from llmtrain.model.scoring import cross_entropy_sum, score, windows
from llmtrain.ops import Mask


@pytest.fixture
def model(make_model):
    return make_model()[1]


def logs(model, tokens):
    with torch.no_grad():
        return model(torch.tensor([tokens]), mask=Mask())["logits"][0].log_softmax(-1)


def test_scores_in_batches_are_those_of_each_pair_alone(model, tokens):
    text = tokens[0].tolist()
    pairs = [(text[:1], text[1:4]), (text[:9], text[9:10]), (text[:3], text[3:20]), (text[:20], text[20:])]
    best = logs(model, text[:5])[-1].argmax().item()
    pairs.append((text[:5], [best]))
    for batch in (1, 2, 8):
        ready = []
        for (context, continuation), got in zip(pairs, score(model, pairs, batch=batch, done=ready.append), strict=True):
            table = logs(model, [*context, *continuation])
            places = range(len(context) - 1, len(context) + len(continuation) - 1)
            assert got.logprob == pytest.approx(sum(table[p, t].item() for p, t in zip(places, continuation)), abs=1e-5)
            assert got.greedy == all(table[p].argmax().item() == t for p, t in zip(places, continuation))
        assert ready[-1] == len(pairs)
    assert score(model, pairs)[-1].greedy
    with pytest.raises(ValueError, match="at least one token"):
        score(model, [([], [1])])


@pytest.mark.parametrize(("context", "stride"), [(8, None), (8, 3), (8, 8), (5, 1), (40, None), (2, 2)])
def test_windows_count_every_token_once(model, tokens, context, stride):
    text = tokens[0].tolist()
    cut = windows(len(text), context=context, stride=stride)
    counted = [t for w in cut for t in range(w.scored, w.end)]
    left_out = {w.begin for w in cut} if stride in (None, context) else {0}
    assert counted == [t for t in range(len(text)) if t not in left_out]
    assert all(w.end - w.begin <= context for w in cut)
    expected = sum(-logs(model, text[w.begin : w.end])[t - w.begin - 1, text[t]].item() for w in cut for t in range(w.scored, w.end))
    nats, count = cross_entropy_sum(model, text, context=context, stride=stride)
    assert (nats, count) == (pytest.approx(expected, rel=1e-9), len(counted))


@pytest.mark.parametrize("wrong", [{"context": 1}, {"context": 8, "stride": 9}, {"context": 8, "stride": -1}])
def test_windows_that_cannot_be(wrong):
    with pytest.raises(ValueError, match="context >= 2"):
        windows(10, **wrong)
