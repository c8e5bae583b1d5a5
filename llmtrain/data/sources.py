"""Kinds of data source: tokenised files, conversations, and what plugins bring, which is checked, as all else rests on it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from llmtrain.config.data import ConversationSource, DataSource, Source, TokenizerConfig
from llmtrain.config.extend import register_kind
from llmtrain.data.chat.source import ConversationSamples
from llmtrain.data.errors import DataError
from llmtrain.data.packing import PackedSource, Sample


class SampleSource(Protocol):
    """Samples of S + 1 tokens that follow from the source's options, S and the seed alone.

    `sample(i)` takes any i >= 0 in any order; sample i is in epoch i // samples_per_epoch. It returns a `Sample`, or the bare array
    of S + 1 token ids if it is one document. No state may move with the calls: a rank asks for its own, a resumed run for later ones.
    """

    samples_per_epoch: int

    def sample(self, index: int) -> Any:
        """Sample `index`, counted through all epochs."""


_OPENERS: dict[type[Source], Callable[..., SampleSource]] = {}


def register_source(section: type[Source]) -> Callable:
    """Decorate `open(source, *, seq_len, seed, shuffle, cache) -> SampleSource`, used for sources of `section`'s kind in `data`.

    section: a class derived from `llmtrain.config.data.Source` with `kind: Literal[NAME] = NAME` and the kind's own options.
    """

    def decorate(opener: Callable[..., SampleSource]) -> Callable[..., SampleSource]:
        _OPENERS[section] = opener
        for option in ("data.train", "data.validation"):
            register_kind(option, section)
        return opener

    return decorate


def open_source(
    source: Source, *, seq_len: int, seed: int, shuffle: bool, cache: Path, tokenizer: TokenizerConfig | None = None
) -> "AnySource":
    """The samples of one source. `tokenizer` is for those that hold text.

    Raises:
        DataError: it cannot be opened, or a plugin's source does not keep to the interface.
    """
    options = {"seq_len": seq_len, "seed": seed, "shuffle": shuffle, "cache": cache}
    if isinstance(source, DataSource):
        return PackedSource(source.path, **options)
    if isinstance(source, ConversationSource):
        return ConversationSamples(source, tokenizer=tokenizer, **options)
    if type(source) not in _OPENERS:
        raise DataError(f"data: a source of kind {source.kind!r} has no @register_source; its plugin is not whole")
    return CheckedSource(source, _OPENERS[type(source)](source, **options), seq_len=seq_len)


class CheckedSource:
    """A plugin's source with every sample checked, and at opening that asking twice, or in another order, gives the same."""

    def __init__(self, source: Source, samples: SampleSource, *, seq_len: int):
        self.kind, self.seq_len, self._samples = source.kind, seq_len, samples
        self.samples_per_epoch = getattr(samples, "samples_per_epoch", None)
        if not isinstance(self.samples_per_epoch, int) or self.samples_per_epoch < 1:
            raise self._broken(f"samples_per_epoch is {self.samples_per_epoch!r}; it must be an integer of at least 1")
        if not callable(getattr(samples, "sample", None)):
            raise self._broken("it has no method sample(index)")
        places = (0, self.samples_per_epoch - 1, self.samples_per_epoch, 0)
        seen = [self.sample(index).tokens for index in places]
        if not np.array_equal(seen[0], seen[3]):
            raise self._broken("sample(0) is not the same when asked for again; it must follow from the seed and the index alone")

    def sample(self, index: int) -> Sample:
        """Sample `index`, counted through all epochs."""
        given = self._samples.sample(index)
        sample = given if isinstance(given, Sample) else Sample(np.asarray(given), np.empty(0, np.int64))
        tokens, borders, learn = sample.tokens, np.asarray(sample.borders), sample.learn
        if tokens.shape != (self.seq_len + 1,) or not np.issubdtype(tokens.dtype, np.integer):
            found = f"{tokens.dtype} of shape {tokens.shape}"
            raise self._broken(f"sample({index}) is {found}; it must be {self.seq_len + 1} integers, one more than the sequence length")
        if tokens.min() < 0:
            raise self._broken(f"sample({index}) has the token id {tokens.min()}; ids are not negative")
        if borders.size and (borders[0] < 1 or borders[-1] > self.seq_len or (np.diff(borders) <= 0).any()):
            raise self._broken(f"sample({index}) has the borders {borders.tolist()}; they must rise within 1..{self.seq_len}")
        if learn is not None and (learn.shape != (self.seq_len,) or learn.dtype != bool):
            raise self._broken(f"sample({index}) has learn of {learn.dtype} of shape {learn.shape}; it must be {self.seq_len} bools")
        return Sample(tokens.astype(np.int64, copy=False), borders.astype(np.int64, copy=False), learn)

    def _broken(self, problem: str) -> DataError:
        opener = type(self._samples)
        return DataError(f"data: source of kind {self.kind!r} ({opener.__module__}.{opener.__qualname__}): {problem} (docs/plugins.md)")


AnySource = PackedSource | ConversationSamples | CheckedSource
"""What `open_source` gives."""
