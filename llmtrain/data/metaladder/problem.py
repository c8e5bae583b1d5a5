"""A problem with its worked solution, and one with the analogous problem that belongs to it; both as JSON lines."""

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from llmtrain.data.errors import DataError


@dataclass(frozen=True)
class Problem:
    """A question with its solution."""

    id: str
    template: str
    """What problems of the same structure have in common; data are split by it."""
    question: str
    solution: str
    """Steps that end with the answer: `... The answer is 7.`"""
    answer: str
    strategy: str = ""
    """Problem type and solution method, in words."""
    reflection: str = ""
    """What there is to say after the solution (RefAug)."""


@dataclass(frozen=True)
class Rung:
    """A problem and a similar one, whose solution leads to its own."""

    problem: Problem
    similar: Problem | None = None

    def swapped(self) -> "Rung":
        """The similar problem with this one as its analogue (the paper's Reverse)."""
        if self.similar is None:
            raise DataError(f"problem {self.problem.id}: has no similar problem, so it cannot be reversed")
        strategy = self.similar.strategy or self.problem.strategy
        return Rung(replace(self.similar, strategy=strategy), self.problem)


def write_lines(path: str | Path, values: Iterable[dict[str, Any]]) -> None:
    """Write JSON lines aside and rename, so that a file that is there is whole."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with aside.open("w", encoding="utf-8") as file:
        for value in values:
            file.write(json.dumps(value, ensure_ascii=False) + "\n")
    aside.replace(path)


def read_lines(path: str | Path) -> list[dict[str, Any]]:
    """The mappings of a file of JSON lines. Raises DataError that names the line."""
    found = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}, line {number}: not JSON ({error})") from error
        if not isinstance(value, dict):
            raise DataError(f"{path}, line {number}: a {type(value).__name__}; a line must be a JSON mapping")
        found.append(value)
    return found


def write_problems(path: str | Path, problems: Iterable[Problem]) -> None:
    """A problem a line."""
    write_lines(path, map(asdict, problems))


def read_problems(path: str | Path) -> list[Problem]:
    """What `write_problems` wrote, and any JSON lines with `question` and `answer`. Raises DataError that names the line."""
    return [_problem(value, f"{path}, line {n}", n) for n, value in enumerate(read_lines(path), 1)]


def write_rungs(path: str | Path, rungs: Iterable[Rung]) -> None:
    """A problem a line, the similar one inside it as `similar`."""
    write_lines(path, (asdict(r.problem) | ({"similar": asdict(r.similar)} if r.similar else {}) for r in rungs))


def read_rungs(path: str | Path) -> list[Rung]:
    """What `write_rungs` wrote. Raises DataError that names the line."""
    rungs = []
    for number, value in enumerate(read_lines(path), 1):
        similar, where = value.pop("similar", None), f"{path}, line {number}"
        rungs.append(Rung(_problem(value, where, number), similar and _problem(similar, f"{where}, similar", number)))
    return rungs


def _problem(value: dict[str, Any], where: str, number: int) -> Problem:
    for name in ("question", "answer"):
        if not str(value.get(name, "")).strip():
            raise DataError(f"{where}: no {name!r}; a problem has at least a question and an answer")
    texts = {name: str(value.get(name, "")) for name in Problem.__dataclass_fields__}
    return Problem(**texts | {"id": texts["id"] or str(number), "template": texts["template"] or "all"})
