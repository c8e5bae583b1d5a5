"""Megatron-LM's memory-mapped token files: `PREFIX.bin` holds the tokens, `PREFIX.idx` where each sequence lies.

Layout of the index (Megatron-LM, megatron/core/datasets/indexed_dataset.py), little-endian:
magic "MMIDIDX\\0\\0", version uint64 = 1, dtype code uint8, number of sequences uint64, number of document indices uint64, then
lengths int32 [sequences] in tokens, pointers int64 [sequences] in bytes, document indices int64 [documents + 1] in sequences.
"""

import os
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from llmtrain.data.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 6: np.float64, 7: np.float32, 8: np.uint16}
CODES = {np.dtype(dtype): code for code, dtype in DTYPES.items()}
UINT16_LIMIT = 65_500
"""Vocabularies below this are stored as uint16, as Megatron-LM does."""
LONGEST = np.iinfo(np.int32).max


def token_dtype(vocab_size: int) -> np.dtype:
    """The dtype that ids of a vocabulary of this size are stored in: uint16 below 65,500, else int32 (Megatron-LM's rule)."""
    return np.dtype(np.uint16 if vocab_size < UINT16_LIMIT else np.int32)


def bin_path(prefix: str | Path) -> Path:
    """`PREFIX.bin`."""
    return Path(f"{prefix}.bin")


def idx_path(prefix: str | Path) -> Path:
    """`PREFIX.idx`."""
    return Path(f"{prefix}.idx")


class TokenWriter:
    """Writes a pair of files as tokens come; both appear under their names only when `close` has written all of them.

    With `sync` they survive a power cut once closed. As a context manager it closes on success and removes what it wrote on an error.
    """

    def __init__(self, prefix: str | Path, dtype: np.dtype | type, *, sync: bool = True) -> None:
        self.prefix, self.dtype, self._sync = Path(prefix), np.dtype(dtype), sync
        if self.dtype not in CODES:
            raise DataError(f"{prefix}: tokens cannot be stored as {self.dtype}; allowed: {', '.join(str(d) for d in CODES)}")
        self.prefix.parent.mkdir(parents=True, exist_ok=True)
        self._lengths: list[np.ndarray] = []
        self._bin = open(f"{self.prefix}.bin.part", "wb")  # noqa: SIM115  closed by close() and discard()

    def add(self, tokens: Sequence[int] | np.ndarray) -> None:
        """Append one document."""
        self.add_many(np.asarray(tokens), [len(tokens)])

    def add_many(self, tokens: np.ndarray, lengths: Sequence[int] | np.ndarray) -> None:
        """Append documents that lie one after another in `tokens` [sum of lengths]; every id must fit the dtype."""
        lengths = np.asarray(lengths, dtype=np.int64)
        if lengths.sum() != len(tokens):
            raise DataError(f"{self.prefix}: document lengths sum to {lengths.sum()}, but {len(tokens)} tokens were given")
        if len(lengths) and lengths.max() > LONGEST:
            raise DataError(f"{self.prefix}: a document of {lengths.max()} tokens exceeds the format's limit of {LONGEST}; split it")
        self._check_range(tokens)
        self._bin.write(np.ascontiguousarray(tokens, dtype=self.dtype).data)
        self._lengths.append(lengths.astype(np.int32))

    def _check_range(self, tokens: np.ndarray) -> None:
        if not len(tokens) or self.dtype.kind == "f" or tokens.dtype == self.dtype:
            return
        limits, low, high = np.iinfo(self.dtype), tokens.min(), tokens.max()
        if low < limits.min or high > limits.max:
            raise DataError(f"{self.prefix}: token ids {low} to {high} do not fit {self.dtype} ({limits.min} to {limits.max})")

    def append_file(self, prefix: str | Path) -> None:
        """Append all documents of another pair of the same dtype, copied as bytes."""
        other = TokenFile(prefix)
        if other.dtype != self.dtype:
            raise DataError(f"{prefix}.idx: tokens are {other.dtype}, cannot be appended to a file of {self.dtype}")
        with open(bin_path(prefix), "rb") as source:
            while block := source.read(1 << 24):
                self._bin.write(block)
        self._lengths.append(np.array(other.sequence_lengths))

    def close(self) -> None:
        """Write the index, then move both files to their names; the index last, so that a pair with an index is complete."""
        self._bin.flush()
        if self._sync:
            os.fsync(self._bin.fileno())
        self._bin.close()
        lengths = np.concatenate([np.zeros(0, np.int32), *self._lengths])
        write_index(f"{self.prefix}.idx.part", lengths, self.dtype, sync=self._sync)
        idx_path(self.prefix).unlink(missing_ok=True)
        os.replace(f"{self.prefix}.bin.part", bin_path(self.prefix))
        os.replace(f"{self.prefix}.idx.part", idx_path(self.prefix))

    def discard(self) -> None:
        """Remove what was written so far."""
        self._bin.close()
        for part in (f"{self.prefix}.bin.part", f"{self.prefix}.idx.part"):
            Path(part).unlink(missing_ok=True)

    def __enter__(self) -> "TokenWriter":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self.discard()


def write_index(path: str | Path, lengths: np.ndarray, dtype: np.dtype, *, sync: bool = True) -> None:
    """Write an index of one sequence per document; `lengths` [documents] int32 in tokens."""
    pointers = np.zeros(len(lengths), np.int64)
    np.cumsum(lengths[:-1], dtype=np.int64, out=pointers[1:])
    pointers *= dtype.itemsize
    with open(path, "wb") as out:
        out.write(HEADER.pack(MAGIC, 1, CODES[dtype], len(lengths), len(lengths) + 1))
        for array in (lengths.astype("<i4"), pointers.astype("<i8"), np.arange(len(lengths) + 1, dtype="<i8")):
            out.write(array.data)
        out.flush()
        if sync:
            os.fsync(out.fileno())


class TokenFile:
    """A memory-mapped pair, opened for reading; validates header and sizes, which costs no pass over the data.

    Errors name the file: missing, foreign or truncated index, tokens missing at the end of `.bin`, lengths that do not sum.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = str(prefix)
        for path in (bin_path(prefix), idx_path(prefix)):
            if not path.is_file():
                raise DataError(f"{path}: no such file; a source is the prefix of a .bin/.idx pair that `llmtrain data tokenize` writes")
        self._read_index(idx_path(prefix))
        self._check_sizes()
        itemsize = self.dtype.itemsize
        size = bin_path(prefix).stat().st_size
        self.tokens = np.memmap(bin_path(prefix), self.dtype, "r", shape=(size // itemsize,)) if size else np.zeros(0, self.dtype)
        """All tokens [T]."""

    def _read_index(self, path: Path) -> None:
        size = path.stat().st_size
        with open(path, "rb") as file:
            head = file.read(HEADER.size)
        if len(head) < HEADER.size:
            raise DataError(f"{path}: truncated: {size} bytes, the header alone has {HEADER.size}")
        magic, version, code, sequences, documents = HEADER.unpack(head)
        if magic != MAGIC:
            raise DataError(f"{path}: not a Megatron index: it starts with {magic!r}, not {MAGIC!r}")
        if version != 1:
            raise DataError(f"{path}: index version {version}; only version 1 is known")
        if code not in DTYPES or np.dtype(DTYPES[code]).kind == "f":
            raise DataError(f"{path}: token dtype code {code} is not one of the integers 1 to 5 and 8")
        wanted = HEADER.size + 12 * sequences + 8 * documents
        if size not in (wanted, wanted + sequences):  # Megatron's multimodal index adds an int8 mode per sequence
            raise DataError(
                f"{path}: {size} bytes, but {sequences} sequences and {documents} document indices need {wanted}; write it anew"
            )
        self.dtype = np.dtype(DTYPES[code])
        raw = np.memmap(path, np.uint8, "r")
        parts = np.cumsum([HEADER.size, 4 * sequences, 8 * sequences, 8 * documents])
        self.sequence_lengths = raw[parts[0] : parts[1]].view("<i4")
        """Tokens per sequence."""
        self.pointers = raw[parts[1] : parts[2]].view("<i8")
        """First byte of each sequence in `.bin`."""
        self.document_indices = raw[parts[2] : parts[3]].view("<i8")
        """First sequence of each document, and at the end the number of sequences."""

    def _check_sizes(self) -> None:
        size, idx = bin_path(self.prefix).stat().st_size, idx_path(self.prefix)
        last = int(self.pointers[-1]) + int(self.sequence_lengths[-1]) * self.dtype.itemsize if len(self.pointers) else 0
        if size < last:
            raise DataError(f"{bin_path(self.prefix)}: truncated: {size} bytes, its index needs {last}; tokenise it again")
        if size > last:
            raise DataError(f"{bin_path(self.prefix)}: {size} bytes, but its index ends at {last}: the pair does not belong together")
        ends = self.document_indices
        if len(ends) and (ends[0] != 0 or ends[-1] != len(self.pointers)):
            raise DataError(f"{idx}: document indices run from {ends[0]} to {ends[-1]}, not from 0 to {len(self.pointers)}")
        if not len(ends) and len(self.pointers):
            raise DataError(f"{idx}: has {len(self.pointers)} sequences but no document indices")

    def __len__(self) -> int:
        """Number of documents."""
        return max(len(self.document_indices) - 1, 0)

    def offsets(self) -> np.ndarray:
        """Where each document begins, and the end of the last: int64 [documents + 1] in tokens."""
        if not len(self):
            return np.zeros(1, np.int64)
        starts = np.concatenate([self.pointers // self.dtype.itemsize, [len(self.tokens)]])
        return starts[self.document_indices]

    def document(self, index: int) -> np.ndarray:
        """Tokens of one document."""
        first, last = self.document_indices[index], self.document_indices[index + 1]
        begin = self.pointers[first] // self.dtype.itemsize if first < len(self.pointers) else len(self.tokens)
        end = self.pointers[last] // self.dtype.itemsize if last < len(self.pointers) else len(self.tokens)
        return self.tokens[begin:end]

    def validate(self, vocab_size: int | None = None, *, limit: int = 1 << 26) -> None:
        """Check the whole index and the ids against a vocabulary.

        Up to `limit` tokens are all looked at; of a larger file, evenly spread blocks that make up `limit` tokens.
        """
        idx = idx_path(self.prefix)
        lengths = self.sequence_lengths.astype(np.int64)
        if (lengths < 0).any():
            raise DataError(f"{idx}: sequence {int(np.argmax(lengths < 0))} has a negative length")
        wanted = np.concatenate([[0], np.cumsum(lengths)[:-1]])[: len(lengths)] * self.dtype.itemsize
        if (wanted != self.pointers).any():
            raise DataError(f"{idx}: sequence {int(np.argmax(wanted != self.pointers))} does not begin where the one before it ends")
        if (np.diff(self.document_indices) < 0).any():
            raise DataError(f"{idx}: document indices decrease")
        if vocab_size is not None:
            self._check_ids(vocab_size, limit)

    def _check_ids(self, vocab_size: int, limit: int) -> None:
        block, total = 1 << 20, len(self.tokens)
        count = -(-total // block)
        chosen = np.unique(np.linspace(0, count - 1, min(count, max(limit // block, 1))).astype(np.int64)) if count else []
        for start in (int(c) * block for c in chosen):
            part = self.tokens[start : start + block]
            low, high = int(part.min()), int(part.max())
            if low < 0 or high >= vocab_size:
                bad = high if high >= vocab_size else low
                at = start + int(np.argmax(part == bad))
                raise DataError(
                    f"{bin_path(self.prefix)}: token {at} is {bad}, but the vocabulary has {vocab_size} ids (0 to {vocab_size - 1}); "
                    "it was written with another tokenizer: set tokenizer.path or model.vocab_size, or tokenise again"
                )
