"""Samples of a `kind: conversations` source."""

import hashlib
from functools import lru_cache
from pathlib import Path

import numpy as np

from llmtrain.config.data import ConversationSource, TokenizerConfig
from llmtrain.data.cache import cached_arrays, content_key
from llmtrain.data.chat.packing import epoch_rows, pack
from llmtrain.data.chat.tokens import Conversations, open_conversations, open_tokenizer
from llmtrain.data.errors import DataError
from llmtrain.data.packing import Sample


class ConversationSamples:
    """Rows of whole conversations; `sample(i)` for any i >= 0, sample i being in epoch i // samples_per_epoch.

    A row of S + 1 tokens ends with padding, a document of its own without targets.

    Args:
        seq_len: S. A conversation of up to S + 1 tokens fits: the last one is only a target.
        seed, shuffle: order of conversations and rows; without shuffle it is that of the file in every epoch.
        cache: folder of tokens and rows.

    Raises:
        DataError: nothing that can be used, a bad sample or one that is too long with the options `bad` and `too_long` at `fail`.
    """

    def __init__(
        self, source: ConversationSource, *, seq_len: int, seed: int, shuffle: bool, cache: Path, tokenizer: TokenizerConfig | None
    ) -> None:
        model = open_tokenizer(tokenizer)
        self.source, self.seq_len, self.seed, self.shuffle, self.pad = source, seq_len, seed, shuffle, model.eod_id
        self.conversations = open_conversations(source, model, cache=cache)
        self.kept, self.too_long = _fitting(self.conversations, source, room=seq_len + 1)
        lengths = self.conversations.lengths[self.kept].clip(max=seq_len + 1)
        digest = hashlib.sha256(lengths).hexdigest()
        key = content_key(format=1, lengths=digest, seq_len=seq_len, seed=seed, shuffle=shuffle, pack=source.pack)
        self._lengths, self._folder = lengths, cache / f"rows-{key}"
        shared = cached_arrays(self._folder / "all", lambda: pack(lengths, room=seq_len + 1, together=source.pack))
        self._row = shared["row"]
        self.samples_per_epoch = int(self._row.max()) + 1
        self._epoch = lru_cache(maxsize=2)(self._open_epoch)

    @property
    def documents(self) -> int:
        """Conversations in an epoch."""
        return len(self.kept)

    @property
    def tokens(self) -> int:
        """Their tokens, without padding."""
        return int(self._lengths.sum())

    @property
    def notes(self) -> list[str]:
        """What people should know of it."""
        found = self.conversations
        counted = sum(int(found.counts[a : a + n].sum()) for a, n in zip(found.starts[self.kept].tolist(), self._lengths.tolist()))
        filled = self.tokens / (self.samples_per_epoch * (self.seq_len + 1))
        lines = [
            f"{self.source.label}: {self.documents:,} conversations (schema {found.schema}, template {self.source.template}), "
            f"{self.tokens:,} tokens of which {counted:,} count; {self.samples_per_epoch:,} rows of {self.seq_len}, {filled:.0%} filled"
        ]
        if found.bad:
            lines.append(f"{self.source.label}: {found.bad:,} bad samples skipped, the first: {'; '.join(found.messages[:3])}")
        if self.too_long:
            did = "shortened" if self.source.too_long == "truncate" else "skipped"
            lines.append(f"{self.source.label}: {self.too_long:,} samples of more than {self.seq_len + 1} tokens {did}")
        return lines

    def sample(self, index: int) -> Sample:
        """Sample `index`, counted through all epochs."""
        epoch, index = divmod(index, self.samples_per_epoch)
        arrays = self._epoch(epoch if self.shuffle else 0)
        members = arrays["members"][arrays["first"][index] : arrays["first"][index + 1]]
        tokens, learn = np.full(self.seq_len + 1, self.pad, np.int64), np.zeros(self.seq_len + 1, bool)
        borders, end, found = [], 0, self.conversations
        for member in members.tolist():
            begin, length = int(found.starts[self.kept[member]]), int(self._lengths[member])
            tokens[end : end + length] = found.tokens[begin : begin + length]
            learn[end : end + length] = found.counts[begin : begin + length]
            end += length
            borders.append(end)
        return Sample(tokens, np.array([b for b in borders if b <= self.seq_len], np.int64), learn[1:])

    def _open_epoch(self, epoch: int) -> dict[str, np.ndarray]:
        key = (self.seed, epoch) if self.shuffle else None
        return cached_arrays(self._folder / f"epoch-{epoch:05d}", lambda: epoch_rows(self._lengths, self._row, key=key))


def _fitting(found: Conversations, source: ConversationSource, *, room: int) -> tuple[np.ndarray, int]:
    """Indices of the conversations that are used, and how many are too long. Raises DataError as `ConversationSamples`."""
    long = found.lengths > room
    lengths = found.lengths
    if long.any() and source.too_long == "fail":
        first = int(np.argmax(long))
        raise DataError(
            f"{found.where[first].decode()}: {lengths[first]} tokens, of which {room} fit (train.seq_len + 1); "
            "raise train.seq_len, or set the source's `too_long` to skip or truncate"
        )
    kept = ~long
    if source.too_long == "truncate":
        for index in np.flatnonzero(long).tolist():
            begin = int(found.starts[index])
            kept[index] = bool(found.counts[begin + 1 : begin + room].any())
    if not kept.any():
        raise DataError(f"{', '.join(source.paths)}: no conversation has an answer within {room} tokens; raise train.seq_len")
    return np.flatnonzero(kept), int(long.sum())
