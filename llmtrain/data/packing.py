"""One token file as an endless, randomly accessible sequence of packed samples.

Each epoch lays the documents one after another in an order of its own and cuts that stream into samples of S + 1 tokens, of which
the last is the first of the next sample (as Megatron-LM's GPTDataset does), so that every token but a sample's first context is a target
once. Documents cross sample borders. The tokens that do not fill a last sample, fewer than S + 1, are left out in that epoch; another
epoch's order leaves out others. Then the samples of the epoch are shuffled. Everything follows from (seed, epoch) alone.
"""

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from llmtrain.data.cache import cached_arrays, content_key
from llmtrain.data.errors import DataError
from llmtrain.data.token_file import TokenFile


@dataclass(frozen=True)
class Sample:
    """S + 1 consecutive tokens of the stream and where documents begin in them."""

    tokens: np.ndarray
    """[S + 1] token ids."""
    borders: np.ndarray
    """Indices in 1..S at which another document begins."""
    learn: np.ndarray | None = None
    """[S] bool: whether the target at a place, which is the token after it, counts; None means all."""


def shuffled(count: int, *key: int) -> np.ndarray:
    """A permutation of 0..count-1 that follows from two integers; the same for every version of numpy.

    Sorts raw Philox words, whose stream numpy keeps stable, unlike that of `Generator.permutation`.
    """
    words = np.random.Philox(key=np.array(key, np.uint64)).random_raw(count)
    order = np.argsort(words, kind="stable")
    return order.astype(np.int32) if count <= np.iinfo(np.int32).max else order


class PackedSource:
    """Samples of one token file; `sample(i)` for any i >= 0, sample i being in epoch i // samples_per_epoch.

    Args:
        prefix: of the `.bin/.idx` pair.
        seq_len: S, tokens per sample (one more is read for the last target).
        seed, shuffle: order of documents and samples; without shuffle it is that of the file in every epoch.
        cache: folder of the index.

    Raises:
        DataError: the pair is missing or damaged, or holds fewer than S + 1 tokens.
    """

    def __init__(self, prefix: str, *, seq_len: int, seed: int, shuffle: bool, cache: Path) -> None:
        self.file, self.seq_len, self.seed, self.shuffle = TokenFile(prefix), seq_len, seed, shuffle
        self.samples_per_epoch = (len(self.file.tokens) - 1) // seq_len
        if self.samples_per_epoch < 1:
            raise DataError(
                f"{prefix}: {len(self.file.tokens)} tokens, fewer than one sample of {seq_len} + 1; "
                "lower train.seq_len (or the phase's seq_len), or give the source more text"
            )
        lengths = hashlib.sha256(self.file.sequence_lengths).hexdigest() + hashlib.sha256(self.file.document_indices).hexdigest()
        key = content_key(format=1, documents=lengths, itemsize=self.file.dtype.itemsize, seq_len=seq_len, seed=seed, shuffle=shuffle)
        self._folder = cache / f"packed-{key}"
        self._epoch = lru_cache(maxsize=2)(self._open_epoch)

    def _open_epoch(self, epoch: int) -> dict[str, np.ndarray]:
        return cached_arrays(self._folder / f"epoch-{epoch:05d}", lambda: self._build_epoch(epoch))

    def _build_epoch(self, epoch: int) -> dict[str, np.ndarray]:
        """starts [documents + 1]: where each document of this epoch's order begins in its stream; order: document ids; samples."""
        lengths = np.diff(self.file.offsets())
        arrays = {}
        if self.shuffle:
            arrays["order"] = shuffled(len(lengths), self.seed, 2 * epoch)
            arrays["samples"] = shuffled(self.samples_per_epoch, self.seed, 2 * epoch + 1)
            lengths = lengths[arrays["order"]]
        arrays["starts"] = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
        return arrays

    def sample(self, index: int) -> Sample:
        """Sample `index`, counted through all epochs."""
        epoch, index = divmod(index, self.samples_per_epoch)
        arrays = self._epoch(epoch if self.shuffle else 0)
        if self.shuffle:
            index = int(arrays["samples"][index])
        begin, end = index * self.seq_len, (index + 1) * self.seq_len + 1
        starts = arrays["starts"]
        first = int(np.searchsorted(starts, begin, "right")) - 1
        last = int(np.searchsorted(starts, end, "left"))
        bounds = np.asarray(starts[first : last + 1])
        documents = np.asarray(arrays["order"][first:last]) if self.shuffle else np.arange(first, last)
        return self._gather(documents, bounds, begin, end)

    def _gather(self, documents: np.ndarray, bounds: np.ndarray, begin: int, end: int) -> Sample:
        """Tokens begin..end of the stream, in which document documents[j] fills bounds[j]..bounds[j+1]."""
        file_starts = (
            self.file.pointers[self.file.document_indices[documents].clip(max=len(self.file.pointers) - 1)] // self.file.dtype.itemsize
        )
        cuts = bounds.clip(begin, end)
        out = np.empty(end - begin, np.int64)
        for source, bound, low, high in zip(file_starts.tolist(), bounds.tolist(), cuts.tolist(), cuts[1:].tolist()):
            out[low - begin : high - begin] = self.file.tokens[source + low - bound : source + high - bound]
        borders = np.unique(cuts[1:-1] - begin)  # unique: an empty document begins where the next one does
        return Sample(out, borders[(borders > 0) & (borders < end - begin)])
