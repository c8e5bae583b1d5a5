"""The bigram baseline: against known entropies, and with documents' ends left out."""

import math

import numpy as np
import pytest

from llmtrain.config.data import DataSource
from llmtrain.data.bigram import bigram_baseline, interpolated_bigram_loss, pairs_within
from llmtrain.data.dataset import build_dataset
from llmtrain.data.errors import DataError
from llmtrain.data.token_file import TokenWriter


def chain(count, seed, vocab=20):
    """Tokens of a Markov chain with two successors per token (probabilities 3/4 and 1/4): 0.562 nats per token."""
    draw = np.random.default_rng(seed)
    steps = np.where(draw.random(count) < 0.75, 1, 7)
    return np.cumsum(steps) % vocab


def test_reaches_the_entropy_of_a_markov_chain():
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    loss = interpolated_bigram_loss(chain(200_000, 0), chain(50_000, 1), 20)
    assert loss == pytest.approx(entropy, abs=0.01)


def test_independent_tokens_give_the_unigram_entropy():
    draw = np.random.default_rng(0)
    shares = np.array([0.5, 0.25, 0.125, 0.125])
    train, validation = draw.choice(4, 100_000, p=shares), draw.choice(4, 50_000, p=shares)
    assert interpolated_bigram_loss(train, validation, 4) == pytest.approx(-(shares * np.log(shares)).sum(), abs=0.01)


def test_probabilities_sum_to_one():
    """The loss over every possible next token of a context is that of a distribution, seen contexts or not."""
    train = chain(5000, 0, vocab=10)
    losses = [interpolated_bigram_loss(train, np.array([v, w]), 12) for v in (3, 11) for w in range(12)]
    assert np.exp(-np.array(losses)).reshape(2, 12).sum(1) == pytest.approx([1, 1], abs=1e-9)


def test_never_seen_pairs_have_finite_loss():
    assert math.isfinite(interpolated_bigram_loss(chain(5000, 0, vocab=10), np.array([0, 0, 11, 11, 0]), 12))


def test_beats_plain_add_one_smoothing():
    draw = np.random.default_rng(0)
    words = draw.zipf(1.3, 60_000) % 500
    train, validation = words[:40_000], words[40_000:]
    counts = np.ones((500, 500))
    np.add.at(counts, (train[:-1], train[1:]), 1)
    plain = -np.log(counts / counts.sum(1, keepdims=True))[validation[:-1], validation[1:]].mean()
    assert interpolated_bigram_loss(train, validation, 500) < plain - 0.3


def test_pairs_do_not_cross_documents():
    pairs = pairs_within(np.array([1, 2, 3, 4, 5]), np.array([0, 2, 2, 5]))
    assert pairs.tolist() == [[1, 3, 4], [2, 4, 5]]
    assert pairs_within(np.array([1, 2, 3])).tolist() == [[1, 2], [2, 3]]


def test_same_targets_as_the_dataset(tmp_path):
    """`inputs` cuts the validation file where its first samples end."""
    rng = np.random.default_rng(0)
    for name, count in (("train", 200), ("validation", 30)):
        with TokenWriter(tmp_path / name, np.uint16) as writer:
            for _ in range(count):
                writer.add(rng.integers(0, 9, rng.integers(1, 40)))
    source = DataSource(path=str(tmp_path / "validation"))
    dataset = build_dataset([source], seq_len=16, samples=5, seed=0, shuffle=False)
    batch = dataset.batch(0, 5)
    seen = {(int(v), int(w)) for v, w in zip(batch.tokens.ravel(), batch.targets.ravel()) if w >= 0}
    from llmtrain.data.token_file import TokenFile

    file = TokenFile(source.path)
    pairs = pairs_within(file.tokens[: 5 * 16 + 1], file.offsets())
    assert pairs.shape[1] == batch.target_count
    assert set(zip(*pairs.tolist())) == seen
    train = [DataSource(path=str(tmp_path / "train"))]
    part = bigram_baseline(train, source, vocab_size=9, inputs=80)
    assert part != bigram_baseline(train, source, vocab_size=9)
    assert part == pytest.approx(math.log(9), abs=0.4)


def test_nothing_to_judge():
    with pytest.raises(DataError, match="cannot be judged"):
        interpolated_bigram_loss(chain(5000, 0), np.array([1]), 20)
