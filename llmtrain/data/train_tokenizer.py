"""Training a sentencepiece BPE vocabulary that gives every text back exactly."""

import io
import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from llmtrain.data.errors import DataError
from llmtrain.data.inputs import ReadOptions, expand, plan_units
from llmtrain.data.readers import Problems, documents

SENTENCE_BYTES = 4000
"""The trainer silently leaves out lines longer than 4,192 bytes; longer ones are cut below that."""
RESERVED = 3
"""<unk>, <s>, </s>: ids 0, 1, 2."""
BYTES = 256
THREADS = 16
"""The library's default; the model file records it, so that it must not depend on the machine. It does not change the pieces."""
SAMPLING_SEED = 1234
"""Of the lines taken where there are more than `max_lines`. The library's own sampling differs from run to run, whatever its seed."""


def training_lines(inputs: Sequence[str], options: ReadOptions) -> Iterator[str]:
    """The non-empty lines of all documents, long ones cut at a space where there is one."""
    problems = Problems(options.bad)
    for unit in plan_units(expand(inputs, options)):
        for document in documents(unit, options, problems):
            for line in document.split("\n"):
                yield from _cut(line) if line else ()


def _cut(line: str) -> Iterator[str]:
    while len(line.encode()) > SENTENCE_BYTES:
        limit = SENTENCE_BYTES // 4  # characters of at most four bytes
        at = line.rfind(" ", 1, limit)
        at = at if at > 0 else limit
        yield line[:at]
        line = line[at:]
    yield line


def train_sentencepiece(
    inputs: Sequence[str],
    out: str | Path,
    *,
    vocab_size: int,
    options: ReadOptions | None = None,
    byte_fallback: bool = True,
    character_coverage: float = 0.9995,
    symbols: Sequence[str] = (),
    max_lines: int = 5_000_000,
) -> Path:
    """Train a BPE model on files and write it to `out`; the same input and options give the same bytes.

    No normalisation, no added or removed space, digits one by one: `decode(encode(text)) == text`, save that a literal U+2581, which
    sentencepiece writes for a space, comes back as one. Characters outside the vocabulary become bytes with `byte_fallback`.

    Args:
        inputs, options: see `tokenize`.
        vocab_size: all pieces together, with 3 reserved ones and 256 bytes.
        character_coverage: share of the text's characters that get a piece of their own.
        symbols: texts that are always one token (chat marks, say).
        max_lines: a sample of this many lines is used if there are more.

    Raises:
        DataError: no text, or a vocabulary size that the text cannot fill or that is too small for its characters.
    """
    model = train_bytes(
        training_lines(inputs, options or ReadOptions()),
        vocab_size=vocab_size,
        byte_fallback=byte_fallback,
        character_coverage=character_coverage,
        symbols=symbols,
        max_lines=max_lines,
    )
    return write_model(model, out)


def write_model(model: bytes, out: str | Path) -> Path:
    """Write a serialised model under its name at once."""
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = out.with_name(f"{out.name}.part")
    aside.write_bytes(model)
    aside.rename(out)
    return out


def train_bytes(
    lines: Iterator[str],
    *,
    vocab_size: int,
    byte_fallback: bool,
    character_coverage: float,
    symbols: Sequence[str],
    max_lines: int,
    exact_size: bool = True,
) -> bytes:
    """Train on lines; the serialised model. Without `exact_size`, text that cannot fill the vocabulary gives a smaller one."""
    import sentencepiece

    smallest = RESERVED + BYTES * byte_fallback + len(symbols) + 1
    if vocab_size < smallest:
        raise DataError(f"--vocab-size {vocab_size} is below {smallest}, the reserved pieces, bytes and symbols alone")
    chosen = sample(lines, max_lines)
    if not chosen:
        raise DataError("--input holds no text to train a tokenizer on")
    model = io.BytesIO()
    settings = {
        "model_type": "bpe",
        "vocab_size": vocab_size,
        "byte_fallback": byte_fallback,
        "character_coverage": character_coverage,
        "normalization_rule_name": "identity",
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "split_digits": True,
        "user_defined_symbols": list(symbols),
        "num_threads": THREADS,
        "hard_vocab_limit": exact_size,
        "minloglevel": 2,
    }
    try:
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(chosen), model_writer=model, **settings)
    except (RuntimeError, ValueError) as error:
        raise DataError(f"the tokenizer cannot be trained with --vocab-size {vocab_size}: {_reason(error)}") from error
    return model.getvalue()


def sample(lines: Iterable[str], most: int) -> list[str]:
    """At most so many of the lines, any of them equally likely and always the same ones (Vitter 1985, algorithm R)."""
    draw, chosen = random.Random(SAMPLING_SEED), []
    for count, line in enumerate(lines):
        if count < most:
            chosen.append(line)
        elif (place := int(draw.random() * (count + 1))) < most:
            chosen[place] = line
    return chosen


def _reason(error: Exception) -> str:
    """What follows source file and condition in the library's message, with our names of its options."""
    message = str(error).strip().rpartition("] ")[2] or str(error)
    return message.replace("vocab_size or decrease character_coverage with --character_coverage option", "--vocab-size or lower --coverage")
