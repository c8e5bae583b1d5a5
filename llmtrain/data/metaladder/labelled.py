"""Problems from elsewhere: JSON lines with a label of their structure, and reasoning-gym's generators."""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

from llmtrain.data.answers import clean, extract
from llmtrain.data.errors import DataError
from llmtrain.data.metaladder.check import equations, fault
from llmtrain.data.metaladder.problem import Problem, read_lines

CALCULATOR = re.compile(r"<<[^<>]{0,200}>>")
GSM_ANSWER = re.compile(r"\s*####\s*(.+?)\s*$")
GYM_REQUEST = " Give the result as your final answer. Do not include units."
WORDS = {"+": "add", "-": "subtract", "*": "multiply", "×": "multiply", "x": "multiply", "/": "divide", "÷": "divide"}


@dataclass(frozen=True)
class Fields:
    """Names of the fields of a file of problems."""

    question: str = "question"
    solution: str = "solution"
    answer: str = "answer"
    label: str = "label"
    strategy: str = "strategy"
    reflection: str = "reflection"


class Labelled:
    """Problems of a file, those of one label being similar to each other."""

    fresh = False

    def __init__(self, path: str | Path, fields: Fields = Fields(), *, seed: int = 0):
        """Raises DataError that names the line for a problem without question, steps or answer."""
        self._found: dict[str, list[Problem]] = {}
        for number, line in enumerate(read_lines(path), 1):
            problem = _from_line(line, fields, f"{path}, line {number}", number)
            self._found.setdefault(problem.template, []).append(problem)
        for template, problems in self._found.items():
            Random(f"{seed}/{template}").shuffle(problems)

    @property
    def templates(self) -> list[str]:
        """The labels, in the order of the file."""
        return list(self._found)

    def draw(self, template: str, count: int) -> list[Problem]:
        """Up to `count` problems of a label, each question once."""
        return list({p.question: p for p in self._found[template]}.values())[:count]


def _from_line(line: dict[str, Any], fields: Fields, where: str, number: int) -> Problem:
    texts = {name: str(line.get(key, "") or "").strip() for name, key in vars(fields).items()}
    if not texts["solution"] and re.search(r"####|\n", texts["answer"]):  # GSM8K's `answer` holds the steps
        texts["solution"], texts["answer"] = texts["answer"], ""
    solution, answer = normalised(texts["solution"], texts["answer"])
    for name, value in (("question", texts["question"]), ("solution", solution), ("answer", answer)):
        if not value:
            raise DataError(f"{where}: no {name} (field {getattr(fields, name)!r}); --{name}-field names another")
    label = texts["label"] or "all"
    strategy = texts["strategy"] or described(label, solution)
    return Problem(str(line.get("id", number)), label, texts["question"], solution, answer, strategy, texts["reflection"])


def normalised(solution: str, answer: str = "") -> tuple[str, str]:
    """A solution that ends with `The answer is X.`, without GSM8K's marks (`<<2*3=6>>`, `#### 6`), and its answer; "" if it has none."""
    solution = CALCULATOR.sub("", solution).strip()
    if match := GSM_ANSWER.search(solution):
        solution, answer = solution[: match.start()].rstrip(), answer or clean(match[1])
    answer = answer or extract(solution) or ""
    if solution and answer and not re.search(r"he (?:final )?answer is|\\boxed", solution):
        solution = f"{solution}\nThe answer is {answer}."
    return solution, answer


def described(label: str, solution: str) -> str:
    """Type and method of a problem for which nobody wrote them: its label, and the operations of its solution in order."""
    done = [WORDS[c] for left, _ in equations(solution) for c in re.findall(r"(?<=\d)\s{0,2}([-+*/×÷x])", left)]
    method = f"Work in {len(done)} steps: {', then '.join(done)}." if done else "Work step by step."
    return f"This is a problem of the type {label}. {method}"


class Gym:
    """reasoning-gym's `gsm_symbolic`: a template is one of its generators. Derived from GSM8K and GSM-Symbolic; mind their licences."""

    fresh = True

    def __init__(self, *, seed: int = 0):
        """Raises DataError without the package."""
        try:
            from reasoning_gym import create_dataset
        except ImportError as error:
            raise DataError(f"--source gym needs reasoning-gym ({error}): pip install 'llmtrain[math]'") from error
        self._create, self._seed, self._filled = create_dataset, seed, 0
        indices = sorted(set(create_dataset("gsm_symbolic", size=4000, seed=seed).task_indices))
        self._index: dict[str, list[Problem]] = {f"gsm_{index}": [] for index in indices}

    @property
    def templates(self) -> list[str]:
        """A name per generator."""
        return list(self._index)

    def draw(self, template: str, count: int) -> list[Problem]:
        """Up to `count` different instances."""
        if count > self._filled:
            self._fill(count)
        return self._index[template][:count]

    def _fill(self, count: int) -> None:
        """Instances of all templates at once, since the package chooses the template of every item itself."""
        items = self._create("gsm_symbolic", size=count * 2 * len(self._index), seed=self._seed)
        found: dict[str, dict[str, Problem]] = {name: {} for name in self._index}
        for place, template in enumerate(items.task_indices):
            there = found.get(f"gsm_{template}")
            if there is not None and len(there) < count:
                problem = _from_gym(items[place], f"gsm_{template}/{len(there)}", f"gsm_{template}")
                if fault(problem.solution, problem.answer) is None:  # some generators round silently
                    there.setdefault(problem.question, problem)
        self._index, self._filled = {name: list(there.values()) for name, there in found.items()}, count


def _from_gym(item: dict[str, Any], id: str, template: str) -> Problem:
    steps = item.get("answer_cot") or item["metadata"]["answer_cot"]
    solution, answer = normalised(steps, str(item["answer"]))
    problem = Problem(id, template, item["question"].removesuffix(GYM_REQUEST), solution, answer)
    return replace(problem, strategy=described("arithmetic in several steps", solution))
