"""The folder of a MetaLadder data set: rungs, the variants' training files, the problems to ask, and the sizes of all of them."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from llmtrain.data.errors import DataError
from llmtrain.data.metaladder.problem import Problem, Rung, read_problems, read_rungs, write_lines, write_problems, write_rungs
from llmtrain.data.metaladder.render import REVERSE, VARIANTS, examples, possible
from llmtrain.data.metaladder.split import Split

RUNGS = "rungs.jsonl"
SIZES = "sizes.json"
ASKED = ("validation", "unseen_instances", "unseen_templates")


@dataclass(frozen=True)
class Size:
    """How much a variant has to train on."""

    variant: str
    problems: int
    examples: int
    prompt: int
    """Tokens of the prompts (characters without a tokenizer)."""
    response: int
    """Tokens of the responses, which the loss is on."""

    @property
    def all(self) -> int:
        """Tokens of prompts and responses."""
        return self.prompt + self.response


def write_split(folder: str | Path, split: Split) -> None:
    """Write the rungs and the problems to ask; empty sets are left out."""
    folder = Path(folder)
    write_rungs(folder / RUNGS, split.rungs)
    for name in ASKED:
        if problems := getattr(split, name):
            write_problems(folder / f"{name}.jsonl", problems)


def rungs_of(folder: str | Path) -> list[Rung]:
    """The rungs of a folder. Raises DataError if it has none."""
    path = Path(folder) / RUNGS
    if not path.is_file():
        raise DataError(f"{folder}: no {RUNGS}; make the data with `llmtrain data metaladder --out {folder}`")
    rungs = read_rungs(path)
    if not rungs:
        raise DataError(f"{path}: is empty; make the data anew with `llmtrain data metaladder --out {folder}`")
    return rungs


def asked_of(folder: str | Path) -> dict[str, list[Problem]]:
    """The problems to ask of a folder by set, as far as it has them."""
    return {name: read_problems(path) for name in ASKED if (path := Path(folder) / f"{name}.jsonl").is_file()}


def variant_names(asked: Sequence[str], rungs: list[Rung]) -> list[str]:
    """What `--variants` asks for; `all` is every variant that the rungs have the parts for, MetaLadder's reversed too."""
    if list(asked) != ["all"]:
        return list(dict.fromkeys(asked))
    names = possible(rungs)
    return [*names, *(name + REVERSE for name in names if name == "metaladder")]


def write_variants(folder: str | Path, variants: Sequence[str], *, count: Callable[[str], int]) -> list[Size]:
    """Write FOLDER/VARIANT.jsonl of prompts and responses from the folder's rungs; their sizes, also in FOLDER/sizes.json.

    count: tokens of a text.
    """
    folder, rungs = Path(folder), rungs_of(folder)
    sizes = []
    for variant in variants:
        lines = list(examples(rungs, variant))
        write_lines(folder / f"{variant}.jsonl", lines)
        sizes.append(size_of(variant, lines, problems=len(rungs), count=count))
    (folder / SIZES).write_text(json.dumps([vars(size) for size in sizes], indent=1) + "\n", encoding="utf-8")
    return sizes


def size_of(variant: str, lines: Sequence[dict], *, problems: int, count: Callable[[str], int]) -> Size:
    """The size of training examples."""
    return Size(variant, problems, len(lines), sum(count(x["prompt"]) for x in lines), sum(count(x["response"]) for x in lines))


def table(sizes: Sequence[Size], *, unit: str) -> str:
    """Markdown: problems, examples, tokens, and the epochs over a variant that make as many tokens as one over the largest."""
    largest = max(size.all for size in sizes)
    head = f"| variant | problems | examples | {unit} of prompts | of responses | epochs for equal {unit} | |"
    lines = [head, "|---|--:|--:|--:|--:|--:|---|"]
    for s in sizes:
        what = VARIANTS[s.variant.removesuffix(REVERSE)].what + (", each also swapped" if s.variant.endswith(REVERSE) else "")
        cells = f"{s.problems:,} | {s.examples:,} | {s.prompt:,} | {s.response:,} | {largest / s.all:.2f}"
        lines.append(f"| {s.variant} | {cells} | {what} |")
    return "\n".join(lines)
