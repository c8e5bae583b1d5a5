"""Mixed and character error rates of transcripts or translations in Chinese and English, as ASCEND's authors count them (arXiv 2112.06223).

llmtrain eval error-rate references.txt hypotheses.txt
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llmtrain.data.ascend import normalise
from llmtrain.errors import UserError

PIECES = re.compile(r"[\x21-\x7e]+|[^\s\x21-\x7e]")
"""Words of ASCII characters, and every other character by itself."""


class Rate(NamedTuple):
    """Edits over tokens of the references, summed over all utterances."""

    name: str
    rate: float
    error: float
    """Standard deviation of a bootstrap over utterances."""
    edits: int
    tokens: int


def mixed_tokens(text: str) -> list[str]:
    """jieba's segments, those with other than ASCII characters cut into characters; without jieba ASCII words and single characters.

    The two differ where jieba cuts ASCII text inside a word, as at an apostrophe.
    """
    try:
        import jieba
    except ImportError:
        return PIECES.findall(text)
    jieba.setLogLevel("ERROR")
    return [token for segment in jieba.cut(text) if segment.strip() for token in ([segment] if segment.isascii() else segment)]


def characters(text: str) -> list[str]:
    """Every character but spaces."""
    return [c for c in text if not c.isspace()]


def error_rates(references: Sequence[str], hypotheses: Sequence[str], *, normalised: bool = True) -> list[Rate]:
    """Mixed and character error rate. `normalised` takes punctuation and case out of both sides first.

    Raises UserError if there are not as many hypotheses as references, if the references hold nothing, or without the package rapidfuzz.
    """
    if len(references) != len(hypotheses):
        raise UserError(f"{len(references)} references and {len(hypotheses)} hypotheses: there must be one for each, a line each")
    if normalised:
        references, hypotheses = [normalise(text) for text in references], [normalise(text) for text in hypotheses]
    return [
        _rate(name, [(cut(r), cut(h)) for r, h in zip(references, hypotheses)])
        for name, cut in (("mixed", mixed_tokens), ("character", characters))
    ]


def _rate(name: str, pairs: list[tuple[list[str], list[str]]]) -> Rate:
    try:
        from rapidfuzz.distance import Levenshtein
    except ImportError as error:
        raise UserError(f"error rates need the package rapidfuzz, which is not installed ({error}): pip install rapidfuzz") from error
    edits = np.array([Levenshtein.distance(reference, hypothesis) for reference, hypothesis in pairs])
    tokens = np.array([len(reference) for reference, _ in pairs])
    if not tokens.sum():
        raise UserError("the references hold no token to compare")
    return Rate(name, float(edits.sum() / tokens.sum()), _bootstrap(edits, tokens), int(edits.sum()), int(tokens.sum()))


def _bootstrap(edits: np.ndarray, tokens: np.ndarray) -> float:
    from llmtrain.tools.paired import DRAWS, SEED

    rows = np.random.default_rng(SEED).integers(0, len(edits), size=(DRAWS, len(edits)))
    sums = tokens[rows].sum(axis=1)
    return float((edits[rows].sum(axis=1)[sums > 0] / sums[sums > 0]).std())


def of_files(references: Path, hypotheses: Path, *, normalised: bool = True) -> list[Rate]:
    """Of two text files, an utterance a line."""
    texts = [path.read_text(encoding="utf-8").removesuffix("\n").split("\n") for path in (references, hypotheses)]
    return error_rates(*texts, normalised=normalised)


def table(rates: Sequence[Rate]) -> str:
    """Markdown: a row per rate, in percent."""
    lines = ["| error rate | % | +/- | edits | tokens |", "|---|--:|--:|--:|--:|"]
    return "\n".join([*lines, *(f"| {r.name} | {100 * r.rate:.2f} | {100 * r.error:.2f} | {r.edits:,} | {r.tokens:,} |" for r in rates)])
