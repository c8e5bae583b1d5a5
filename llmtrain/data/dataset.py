"""What a run trains on: several packed sources, blended; sample i is the same whatever the mesh, the engine or the moment of resuming."""

import glob
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from llmtrain.config.data import ConversationSource, DataSource, Source, TokenizerConfig
from llmtrain.data.batch import NO_TARGET, Batch
from llmtrain.data.blend import Blend
from llmtrain.data.chat.source import ConversationSamples
from llmtrain.data.errors import DataError
from llmtrain.data.packing import PackedSource, Sample
from llmtrain.data.sources import AnySource, open_source


@dataclass(frozen=True)
class SourceUse:
    """How much of one source a dataset reads."""

    name: str
    share: float
    """Wanted share of the samples, the shares of all sources summing to 1."""
    samples: int
    """Samples taken from it."""
    samples_per_epoch: int
    documents: int | None
    tokens: int
    """Size of the source; the documents of a plugin's source are not known, nor its tokens but for those of an epoch's samples."""

    @property
    def epochs(self) -> float:
        """How often it is read through."""
        return self.samples / self.samples_per_epoch


class Dataset:
    """`samples` samples of S tokens from blended sources; made by `build_dataset`."""

    def __init__(self, names: list[str], sources: list[AnySource], blend: Blend, *, samples: int, document_mask: bool) -> None:
        self._names, self._sources, self._blend = names, sources, blend
        self._samples, self._document_mask = samples, document_mask
        self.seq_len = sources[0].seq_len

    def __len__(self) -> int:
        return self._samples

    @property
    def epochs(self) -> list[SourceUse]:
        """What is read from each source, with how many epochs that makes."""
        counts, total = self._blend.counts(self._samples), sum(self._blend.shares)
        return [
            SourceUse(name, share / total, count, source.samples_per_epoch, *_size(source))
            for name, source, share, count in zip(self._names, self._sources, self._blend.shares, counts)
        ]

    @property
    def notes(self) -> list[str]:
        """What sources have to say of what they found."""
        return [note for source in self._sources for note in getattr(source, "notes", ())]

    def batch(self, first: int, count: int) -> Batch:
        """Samples first .. first + count - 1; any order of calls gives the same samples.

        Raises:
            IndexError: beyond the dataset's length.
        """
        if first < 0 or count < 1 or first + count > self._samples:
            raise IndexError(f"samples {first} to {first + count - 1} of a dataset of {self._samples}")
        places = [self._blend[i] for i in range(first, first + count)]
        samples = [self._sources[source].sample(index) for source, index in places]
        return to_batch(samples, indices=range(first, first + count), document_mask=self._document_mask)


def _size(source: AnySource) -> tuple[int | None, int]:
    if isinstance(source, PackedSource):
        return len(source.file), len(source.file.tokens)
    if isinstance(source, ConversationSamples):
        return source.documents, source.tokens
    return None, source.samples_per_epoch * source.seq_len


def to_batch(samples: Sequence[Sample], *, indices: Sequence[int], document_mask: bool) -> Batch:
    """A batch of packed samples.

    With `document_mask`, positions restart at each document and the last token of a document has no target (the next token belongs to
    another one); without it, every token has a target and positions run through the sample. What a sample is not to learn has none either.
    """
    rows = np.stack([s.tokens for s in samples])
    tokens, targets = rows[:, :-1].copy(), rows[:, 1:].copy()
    seq_len = tokens.shape[1]
    positions = np.tile(np.arange(seq_len), (len(samples), 1))
    for row, sample in enumerate(samples):
        if sample.learn is not None:
            targets[row, ~sample.learn] = NO_TARGET
    documents = []
    for row, sample in enumerate(samples if document_mask else ()):
        targets[row, sample.borders - 1] = NO_TARGET
        starts = np.concatenate([[0], sample.borders[sample.borders < seq_len]])
        lengths = np.diff(starts, append=seq_len)
        positions[row] -= np.repeat(starts, lengths)
        documents.append(tuple(lengths.tolist()))
    arrays = [torch.from_numpy(a) for a in (tokens, targets, positions)]
    return Batch(*arrays, documents=tuple(documents) if document_mask else None, samples=tuple(indices))


def source_names(sources: Sequence[Source]) -> list[str]:
    """The label of each source; two alike are an error."""
    names = [s.label for s in sources]
    for name in names:
        if names.count(name) > 1:
            raise DataError(f"data: two sources are called {name!r}; give one of them another name (data.train.N.name)")
    return names


def source_weights(sources: Sequence[Source], weights: Mapping[str, float] | None) -> list[float]:
    """One weight per source: its own, or where `weights` is given that of its name there, 0 if it has none."""
    names = source_names(sources)
    unknown = sorted(set(weights or ()) - set(names))
    if unknown:
        raise DataError(f"train.phases.mix names {unknown[0]!r}, which is no source; data.train has {', '.join(names)}")
    values = [s.weight if weights is None else weights.get(name, 0.0) for s, name in zip(sources, names)]
    if not any(values):
        raise DataError("data.train: all weights are 0; give at least one source (data.train.N.weight or the phase's mix) a weight")
    return values


def cache_folder(sources: Sequence[Source], cache: str | Path | None) -> Path:
    """Where the sample index lives: `cache`, or `.cache` beside the first source of files; `data/.cache` if there is none."""
    files = (s.path if isinstance(s, DataSource) else s.paths[0] for s in sources if isinstance(s, DataSource | ConversationSource))
    local = (Path(path).parent for path in files if "://" not in path and not glob.has_magic(path))
    beside = next(local, Path("data"))
    return Path(cache) if cache else beside / ".cache"


def build_dataset(
    sources: Sequence[Source],
    *,
    seq_len: int,
    samples: int | None,
    seed: int,
    weights: Mapping[str, float] | None = None,
    document_mask: bool = True,
    shuffle: bool = True,
    cache: str | Path | None = None,
    tokenizer: TokenizerConfig | None = None,
) -> Dataset:
    """Open the sources, pack and blend them.

    Args:
        seq_len: S, tokens per sample.
        samples: the dataset's length, on which sample i does not depend; None reads every source with a weight once, each in
            proportion to its size whatever its weight.
        seed: of the order of documents and samples; each epoch has its own.
        weights: per source name, instead of the sources' own; a source that is not named is not used.
        document_mask: tokens see their own document only (see `to_batch`).
        shuffle: documents and samples in an order of each epoch; else that of the files.
        cache: folder of the sample index, which the first process builds; `.cache` beside the first source if None.
        tokenizer: for sources that hold text.

    Raises:
        DataError: no source, unknown names, weights all 0, a file missing or damaged, too few tokens for a sample.
    """
    if not sources:
        raise DataError("data.train is empty; give at least one source, the prefix of a .bin/.idx pair")
    folder = cache_folder(sources, cache)
    used = [(n, s, w) for n, s, w in zip(source_names(sources), sources, source_weights(sources, weights)) if w]
    options = {"seq_len": seq_len, "seed": seed, "shuffle": shuffle, "cache": folder, "tokenizer": tokenizer}
    packed = [open_source(s, **options) for _, s, _ in used]
    once = [p.samples_per_epoch for p in packed]
    length = sum(once) if samples is None else samples
    shares = once if samples is None else [w for _, _, w in used]  # by size, all sources end together after one pass
    blend = Blend(shares, samples=length, cache=folder)
    return Dataset([n for n, _, _ in used], packed, blend, samples=length, document_mask=document_mask)
