"""A bigram model of the same tokens: what a model that looks one token back can reach, and a trained one must beat.

p(w | v) is a mixture of bigram, unigram and uniform probabilities with weights per bucket of the count c(v) (Jelinek and Mercer
1980), fitted by expectation-maximisation on a tenth of the training tokens that is counted apart. The bigram part is smoothed by absolute
discounting (Kneser and Ney 1995), max(c(v, w) - d, 0) / c(v) + d n(v) / c(v) m(w) / sum m, where n(v) different tokens follow v and
m(w) different ones precede w: on the quickstart's text that makes the baseline 2 % harder to beat than plain counts.
"""

from collections.abc import Sequence

import numpy as np

from llmtrain.config.data import DataSource
from llmtrain.data.errors import DataError
from llmtrain.data.token_file import TokenFile

BUCKETS = 40
"""Bucket of a context: twice the binary logarithm of its count, at most this."""
ROUNDS = 50
"""Of expectation-maximisation; the loss changes by less than 1e-5 long before."""
PRIOR = np.array([8.0, 1.0, 1.0])
"""Pairs taken as seen in each bucket, so that no token becomes nearly impossible after a context on which few pairs are held out."""
TRAIN_LIMIT = 100_000_000
"""Tokens counted at most per source, from its start."""


class BigramCounts:
    """Counts of pairs (v, w), of contexts c(v) and of next tokens c(w)."""

    def __init__(self, pairs: np.ndarray, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._keys, self._counts = np.unique(pairs[0] * vocab_size + pairs[1], return_counts=True)
        self._context = np.bincount(pairs[0], minlength=vocab_size)
        self._next = np.bincount(pairs[1], minlength=vocab_size) / max(pairs.shape[1], 1)
        once, twice = (self._counts == 1).sum(), (self._counts == 2).sum()
        self._discount = once / max(once + 2 * twice, 1)
        followers = np.bincount(self._keys // vocab_size, minlength=vocab_size)
        self._left_over = np.where(self._context, self._discount * followers / np.maximum(self._context, 1), 1.0)
        self._precede = np.bincount(self._keys % vocab_size, minlength=vocab_size) / max(len(self._keys), 1)

    def components(self, pairs: np.ndarray) -> np.ndarray:
        """Probability of each pair's second token under bigram, unigram and uniform: [3, pairs]."""
        keys = pairs[0] * self._vocab_size + pairs[1]
        found = np.searchsorted(self._keys, keys).clip(max=max(len(self._keys) - 1, 0))
        count = np.where(self._keys[found] == keys, self._counts[found], 0)
        uniform = np.full(len(keys), 1 / self._vocab_size)
        discounted = np.maximum(count - self._discount, 0) / np.maximum(self._context[pairs[0]], 1)
        return np.stack([discounted + self._left_over[pairs[0]] * self._precede[pairs[1]], self._next[pairs[1]], uniform])

    def buckets(self, contexts: np.ndarray) -> np.ndarray:
        """Which weights each context has: 0 for one never seen."""
        count = self._context[contexts]
        return np.where(count, 1 + np.floor(2 * np.log2(np.maximum(count, 1))), 0).astype(np.int64).clip(max=BUCKETS)


def pairs_within(tokens: np.ndarray, ends: np.ndarray | None = None) -> np.ndarray:
    """(token, next token) as int64 [2, pairs], without those in which a document ends; `ends` are its documents' ends in tokens."""
    keep = np.ones(max(len(tokens) - 1, 0), bool)
    if ends is not None:
        inner = ends[(ends > 0) & (ends < len(tokens))]
        keep[inner - 1] = False
    tokens = np.asarray(tokens, np.int64)
    return np.stack([tokens[:-1][keep], tokens[1:][keep]])


def fit_weights(components: np.ndarray, buckets: np.ndarray) -> np.ndarray:
    """Weights [3, BUCKETS + 1] that make the components' mixture most likely, with `PRIOR` added to what is seen."""
    weights = np.full((3, BUCKETS + 1), 1 / 3)
    for _ in range(ROUNDS):
        parts = weights[:, buckets] * components
        parts /= parts.sum(0)
        mass = np.stack([np.bincount(buckets, part, BUCKETS + 1) for part in parts])
        total = mass.sum(0)
        weights = (mass + PRIOR[:, None]) / (total + PRIOR.sum())
    return weights


def interpolated_bigram_loss(
    train_tokens: np.ndarray,
    validation_tokens: np.ndarray,
    vocab_size: int,
    *,
    train_ends: np.ndarray | None = None,
    validation_ends: np.ndarray | None = None,
) -> float:
    """Loss of the model above on the validation tokens, in nats per target.

    Args:
        train_tokens, validation_tokens: ids below `vocab_size`.
        train_ends, validation_ends: where documents end; the token after an end is no target then, as in a packed dataset.
            None takes all tokens for one document.

    Raises:
        DataError: fewer than 20 training pairs, or no target to judge by.
    """
    return _loss(pairs_within(train_tokens, train_ends), pairs_within(validation_tokens, validation_ends), vocab_size)


def _loss(train: np.ndarray, validation: np.ndarray, vocab_size: int) -> float:
    if train.shape[1] < 20 or not validation.shape[1]:
        raise DataError(f"a bigram model of {train.shape[1]} training and {validation.shape[1]} validation pairs cannot be judged")
    block = max(1, min(4096, train.shape[1] // 20))
    held_out = np.arange(train.shape[1]) // block % 10 == 9
    counted = BigramCounts(train[:, ~held_out], vocab_size)
    judge = train[:, held_out]
    weights = fit_weights(counted.components(judge), counted.buckets(judge[0]))
    counts = BigramCounts(train, vocab_size)
    mixture = (weights[:, counts.buckets(validation[0])] * counts.components(validation)).sum(0)
    return float(-np.log(mixture).mean())


def bigram_baseline(
    train: Sequence[DataSource],
    validation: DataSource,
    *,
    vocab_size: int,
    document_mask: bool = True,
    inputs: int | None = None,
) -> float:
    """`interpolated_bigram_loss` of whole sources, which all count once whatever their weights (at most 100 M tokens of each).

    Args:
        document_mask: as in the dataset; without it the token after a document's end is a target too.
        inputs: judge only the first so many input tokens of the validation file, those that its first `inputs / S` samples hold.
    """
    files = [TokenFile(source.path) for source in train if source.weight]
    pairs = [pairs_within(f.tokens[:TRAIN_LIMIT], f.offsets() if document_mask else None) for f in files]
    judged = TokenFile(validation.path)
    stop = None if inputs is None else inputs + 1
    against = pairs_within(judged.tokens[:stop], judged.offsets() if document_mask else None)
    return _loss(np.concatenate(pairs, axis=1), against, vocab_size)
