"""A tokenised pair in words, for people."""

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from llmtrain.data.token_file import TokenFile, bin_path, idx_path
from llmtrain.data.tokenize import read_notes
from llmtrain.data.tokenizer import Tokenizer

SHOWN = 400
"""Characters of a text shown."""
BAR = 40


def describe(prefix: str | Path, tokenizer: Tokenizer | None) -> list[str]:
    """Sizes, the lengths of documents, and that the pair is sound.

    Raises:
        DataError: it is not.
    """
    file, notes = TokenFile(prefix), read_notes(prefix) or {}
    vocab_size = tokenizer.vocab_size if tokenizer else notes.get("vocab_size")
    file.validate(vocab_size)
    lengths = np.diff(file.offsets())
    size = bin_path(prefix).stat().st_size + idx_path(prefix).stat().st_size
    lines = [f"{prefix}: {len(file):,} documents, {len(file.tokens):,} tokens as {file.dtype}, {size / 1e6:,.1f} MB"]
    if notes:
        lines.append(
            f"written from {notes.get('input_files')} files with tokenizer {notes.get('tokenizer')} of {notes.get('vocab_size')} ids"
        )
    if tokenizer and notes and notes.get("tokenizer") != tokenizer.fingerprint():
        lines.append(f"WARNING: this tokenizer ({tokenizer.fingerprint()}) is not the one that wrote it")
    if vocab_size:
        lines.append(f"sound: ids are below the vocabulary's {vocab_size}")
    else:
        lines.append("sound as a file; ids were not checked (pass --tokenizer)")
    return lines + histogram(lengths, of="document")


def histogram(lengths: np.ndarray, *, of: str) -> list[str]:
    """Tokens per `of` in words, and how many are of which length, by powers of two."""
    if not len(lengths):
        return []
    low, middle, high = np.percentile(lengths, [0, 50, 100]).astype(int)
    lines = [f"tokens per {of}: least {low:,}, median {middle:,}, mean {lengths.mean():,.0f}, most {high:,}"]
    powers = np.where(lengths > 0, np.floor(np.log2(np.maximum(lengths, 1))) + 1, 0).astype(int)
    counts = np.bincount(powers)
    for power in range(powers.min(), len(counts)):
        span = "empty" if power == 0 else f"{2 ** (power - 1):,} to {2**power - 1:,}"
        lines.append(f"  {span:>24} {counts[power]:>12,} {'#' * round(BAR * counts[power] / counts.max())}")
    return lines


def documents(prefix: str | Path, tokenizer: Tokenizer | None, *, count: int) -> list[str]:
    """The beginnings of the first documents."""
    file, lines = TokenFile(prefix), []
    for index in range(min(count, len(file))):
        tokens = file.document(index)
        lines += [f"--- document {index}: {len(tokens):,} tokens", _show(tokens, tokenizer)]
    return lines


def _show(tokens: Sequence[int], tokenizer: Tokenizer | None) -> str:
    if tokenizer is None:
        return " ".join(map(str, tokens[: SHOWN // 8])) + (" ..." if len(tokens) > SHOWN // 8 else "")
    text = tokenizer.decode(tokens[:SHOWN])
    return text[:SHOWN] + (" ..." if len(text) > SHOWN or len(tokens) > SHOWN else "")


def packed(prefix: str | Path, tokenizer: Tokenizer | None, *, seq_len: int, count: int, seed: int) -> list[str]:
    """Samples as a run packs them: each document's part with its length, and where no target is."""
    from llmtrain.config.data import DataSource
    from llmtrain.data.dataset import build_dataset

    lines = []
    with tempfile.TemporaryDirectory() as cache:
        dataset = build_dataset([DataSource(path=str(prefix))], seq_len=seq_len, samples=count, seed=seed, cache=cache)
        lines.append(f"packed to {seq_len}: {dataset.epochs[0].samples_per_epoch:,} samples per epoch")
        batch = dataset.batch(0, count)
    for row, lengths in enumerate(batch.documents):
        targets = int((batch.targets[row] >= 0).sum())
        lines.append(f"--- sample {row}: {len(lengths)} documents of {', '.join(map(str, lengths))} tokens, {targets} targets")
        for number, part in enumerate(_parts(batch.tokens[row].tolist(), lengths)):
            lines.append(f"[{number}] {_show(part, tokenizer)}")
    return lines


def _parts(tokens: list[int], lengths: Sequence[int]) -> Iterator[list[int]]:
    start = 0
    for length in lengths:
        yield tokens[start : start + length]
        start += length
