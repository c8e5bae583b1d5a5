"""Answers of mathematical problems: found in a text, and compared.

Extraction goes as in MetaLadder's evaluation (arXiv 2503.14891): the last \\boxed{}, else what follows the last "he answer is", else the
last number.
Texts of models are hostile as far as they are long or strange: nothing here evaluates them, patterns are bounded, and symbolic comparison
runs in a process of its own with limits (`llmtrain.data.symbolic`).
"""

import re
from fractions import Fraction

LONGEST = 20_000
"""Characters at the end of a text that are looked at."""
PHRASE = re.compile(r"he (?:final )?answer is:?|####")
NUMBER = re.compile(r"-?\d{1,30}(?:,\d{3}){0,10}(?:\.\d{1,30})?(?:\s?/\s?\d{1,30})?")
PLAIN = re.compile(r"([-+]?)\$?(\d{1,30}(?:,\d{3}){0,10}|)((?:\.\d{1,30})?)(?:[eE]([-+]?\d{1,2}))?\s?(%|\\%)?")
FRACTION = re.compile(r"([-+]?)\s?(?:\\[dt]?frac\{(\d{1,30})\}\{(\d{1,30})\}|(\d{1,30})\s?/\s?(\d{1,30}))")
UNIT = re.compile(r"(?<=\d)\s{1,3}[A-Za-z][A-Za-z \-]{0,60}$")
TOLERANCE = Fraction(1, 10_000)
"""Relative, of numbers of which one is written with decimals."""


def extract(text: str) -> str | None:
    """The answer that a text states, as it is written; None if there is none."""
    text = text[-LONGEST:]
    for found in (_boxed(text), _after_phrase(text), _last_number(text)):
        if found:
            return found
    return None


def equal(given: str | None, expected: str, *, symbolic: bool = True) -> bool:
    """Whether two answers are the same number or expression.

    `symbolic`: what is no plain number is compared by `math-verify` in a process of its own with a time limit; without that package an
    expected number is simply not met by what is none, and an expected expression raises UserError.
    """
    if given is None or not given.strip():
        return False
    given, expected = clean(given), clean(expected)
    if given == expected:
        return True
    values = number(given), number(expected)
    if None not in values:
        return _same(*values, exact=not any("." in side for side in (given, expected))) or _as_percent(given, expected, *values)
    if not symbolic or not _comparable(given, expected):
        return False
    from llmtrain.data.symbolic import available, same

    return False if values[1] is not None and not available() else same(given, expected)


def number(text: str) -> Fraction | None:
    """The value of a plain number: `1,200`, `$3.50`, `3/4`, `\\frac{3}{4}`, `40%` (as 40), `8 apples`; None for anything else."""
    text = UNIT.sub("", clean(text))
    if match := FRACTION.fullmatch(text):
        above, below = int(match[2] or match[4]), int(match[3] or match[5])
        return None if below == 0 else (-1 if match[1] == "-" else 1) * Fraction(above, below)
    match = PLAIN.fullmatch(text)
    if not match or not (match[2] or match[3]):
        return None
    value = Fraction(f"{match[2].replace(',', '') or '0'}{match[3]}") * Fraction(10) ** int(match[4] or 0)
    return -value if match[1] == "-" else value


def clean(text: str) -> str:
    """An answer without what does not belong to it: $ of LaTeX, \\text{}, spaces, a full stop at its end."""
    text = text.strip()[:LONGEST]
    text = re.sub(r"\\(?:text|mathrm|mbox)\{([^{}]{0,200})\}", r" \1", text).replace("\\!", "").replace("\\,", " ").replace("\\$", "$")
    text = text.removesuffix(".").strip()
    if len(text) > 1 and text[0] == text[-1] == "$":
        text = text.strip("$")
    return re.sub(r"\s{1,50}", " ", text).strip().removesuffix(".").strip()


def _same(a: Fraction, b: Fraction, *, exact: bool) -> bool:
    return a == b if exact else abs(a - b) <= TOLERANCE * max(abs(a), abs(b))


def _as_percent(given: str, expected: str, a: Fraction, b: Fraction) -> bool:
    """40% is 0.4 as well."""
    marked = ["%" in given, "%" in expected]
    return marked in ([True, False], [False, True]) and (a / 100 == b if marked[0] else a == b / 100)


def _comparable(given: str, expected: str) -> bool:
    """Whether there is a point in asking for symbolic equality: words alone are no expression."""
    return all(len(side) <= 300 and re.search(r"[\d\\^=()]|^[a-zA-Z]$", side) for side in (given, expected))


def _boxed(text: str) -> str | None:
    start = max(text.rfind("\\boxed{"), text.rfind("\\fbox{"))
    if start < 0:
        return None
    start, depth = text.index("{", start) + 1, 1
    for end in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return text[start:end].strip() or None
    return None


def _after_phrase(text: str) -> str | None:
    matches = list(PHRASE.finditer(text))
    if not matches:
        return None
    rest = text[matches[-1].end() :].strip().split("\n")[0]
    return clean(re.split(r"\.\s", rest, maxsplit=1)[0]) or None


def _last_number(text: str) -> str | None:
    found = NUMBER.findall(text)
    return found[-1] if found else None
