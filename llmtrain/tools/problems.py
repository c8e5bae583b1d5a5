"""Ask a model problems and check its answers: plain, or by MetaLadder's shortcut (arXiv 2503.14891, section 3.4).

Plain: the model writes all of its response. Shortcut: it writes type and method and is stopped where the similar problem would begin; the
problem is restated in its place, and the model goes on to the solution.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean

from llmtrain.data.answers import equal, extract
from llmtrain.data.metaladder.problem import Problem
from llmtrain.data.metaladder.render import ORIGINAL, ORIGINAL_SOLUTION, SEPARATOR, SIMILAR, prompt
from llmtrain.errors import UserError
from llmtrain.model.sampling import Sampling
from llmtrain.tools.completions import Completion, Request, Texts, runner_for
from llmtrain.tools.open_model import OpenModel
from llmtrain.tools.progress import Progress

STOPS = ("### Instruction", "\n\nExplanation", "\n\nReflection")
"""The paper's, for models that do not end by themselves."""
AT_SIMILAR = SEPARATOR + SIMILAR
INFERENCES = ("plain", "shortcut")


@dataclass(frozen=True)
class Answered:
    """One problem and what the model made of it."""

    id: str
    template: str
    expected: str
    answer: str | None
    correct: bool
    text: str
    """The response; with the shortcut the restated problem is in it."""
    finished: str
    """`stop`, or `length` if it was cut."""
    tokens: int
    """Tokens that the model wrote."""
    seconds: float
    """Its share of the whole time, by tokens: neighbours of a batch share the model."""


def solve(
    opened: OpenModel,
    problems: Sequence[Problem],
    *,
    inference: str = "plain",
    max_new: int = 512,
    batch: int = 8,
    sampling: Sampling | None = None,
) -> list[Answered]:
    """Ask all problems, `batch` at a time, greedily unless `sampling` says otherwise.

    max_new: tokens that the model may write for a problem, both parts of a shortcut together; less where the model's length ends.

    Raises UserError for a prompt that fills the model, or an unknown inference.
    """
    if inference not in INFERENCES:
        raise UserError(f"--inference {inference!r}: allowed are {', '.join(INFERENCES)}")
    if not problems:
        return []
    started = time.perf_counter()
    base = sampling or Sampling(temperature=0, stop_ids=_ends(opened))
    asker = _Asker(opened, base, batch)
    prompts = [opened.encode(prompt(p.question)) for p in problems]
    if inference == "plain":
        done = asker.ask(prompts, [max_new] * len(prompts), STOPS)
        texts, tokens = [item.text for item in done], [len(item.tokens) for item in done]
    else:
        texts, tokens, done = _shortcut(asker, opened, prompts, problems, max_new)
    seconds = time.perf_counter() - started
    each = seconds / max(1, sum(tokens))
    return [
        _answered(problem, text, item.finished, count, count * each)
        for problem, text, item, count in zip(problems, texts, done, tokens, strict=True)
    ]


def _ends(opened: OpenModel) -> tuple[int, ...]:
    """Tokens that end a response: the model's own ends, and the tokenizer's end of sequence, with which training examples end."""
    eos = opened.need_tokenizer().eos_id
    return opened.stop_ids if eos is None or eos in opened.stop_ids else (*opened.stop_ids, eos)


def _shortcut(
    asker: "_Asker", opened: OpenModel, prompts: list[list[int]], problems: Sequence[Problem], max_new: int
) -> tuple[list[str], list[int], list[Completion]]:
    first = asker.ask(prompts, [max_new] * len(prompts), (*STOPS, AT_SIMILAR))
    heads = [f"{item.text.strip()}{SEPARATOR}{ORIGINAL}\n{problem.question}" for item, problem in zip(first, problems)]
    encode = opened.need_tokenizer().encode
    second = asker.ask(
        [tokens + encode(head) for tokens, head in zip(prompts, heads)], [max(1, max_new - len(item.tokens)) for item in first], STOPS
    )
    texts = [head + item.text for head, item in zip(heads, second)]
    return texts, [len(a.tokens) + len(b.tokens) for a, b in zip(first, second)], second


class _Asker:
    def __init__(self, opened: OpenModel, sampling: Sampling, batch: int):
        self._opened, self._sampling, self._batch = opened, sampling, batch

    def ask(self, prompts: list[list[int]], limits: list[int], stop: tuple[str, ...]) -> list[Completion]:
        longest = self._opened.cfg.max_seq_len
        requests = [Request(tokens, self._rule(longest - len(tokens), limit), stop) for tokens, limit in zip(prompts, limits)]
        texts = Texts(runner_for(self._opened, requests, batch=self._batch), self._opened.need_tokenizer(), requests)
        with Progress("problems", len(requests), "answers") as progress:
            ended: set[int] = set()
            for index, _ in texts:
                if texts.items[index].finished:
                    ended.add(index)
                    progress.at(len(ended))
        return texts.items

    def _rule(self, room: int, limit: int) -> Sampling:
        if room < 1:
            raise UserError(f"a problem fills the model: model.max_seq_len is {self._opened.cfg.max_seq_len}")
        values = asdict(self._sampling)
        return Sampling(**values | {"max_new": min(limit, room)})


def solution_part(text: str, question: str) -> str | None:
    """The part of a response that solves the original problem; None if it broke off before.

    What stands in a similar problem's solution is no answer, however well it was solved, nor is a number of the restated question.
    """
    _, header, after = text.rpartition(f"{ORIGINAL_SOLUTION}\n")
    if header:
        return after.split(AT_SIMILAR)[0]
    _, restated, after = text.rpartition(f"{ORIGINAL}\n")
    if restated:  # and solved without the header
        return after.removeprefix(question).strip() or None if after.startswith(question) else None
    return None if SIMILAR in text else text


def _answered(problem: Problem, text: str, finished: str, tokens: int, seconds: float) -> Answered:
    part = solution_part(text, problem.question)
    answer = None if part is None else extract(part)
    correct = equal(answer, problem.answer)
    return Answered(problem.id, problem.template, problem.answer, answer, correct, text, finished, tokens, seconds)


@dataclass(frozen=True)
class Score:
    """Problems of one template, or all of them."""

    template: str
    count: int
    accuracy: float
    error: float
    """Standard error of the accuracy: sqrt(p (1 - p) / n)."""
    tokens: float
    """Tokens that the model wrote per problem."""
    seconds: float
    """Per problem."""


def score(answers: Sequence[Answered], template: str = "all") -> Score:
    """The score of answers."""
    right = fmean(a.correct for a in answers)
    error = math.sqrt(right * (1 - right) / len(answers))
    return Score(template, len(answers), right, error, fmean(a.tokens for a in answers), fmean(a.seconds for a in answers))


def scores(answers: Sequence[Answered]) -> list[Score]:
    """A score per template in alphabetical order, the last one of all together."""
    names = sorted({a.template for a in answers})
    return [*(score([a for a in answers if a.template == name], name) for name in names), score(answers)]


def table(found: Sequence[Score]) -> str:
    """Markdown."""
    lines = ["| template | problems | correct | standard error | tokens | seconds |", "|---|--:|--:|--:|--:|--:|"]
    for s in found:
        lines.append(f"| {s.template} | {s.count:,} | {s.accuracy:.1%} | {s.error:.1%} | {s.tokens:.1f} | {s.seconds:.3f} |")
    return "\n".join(lines)


def as_json(answers: Sequence[Answered]) -> dict:
    """Scores and every answer, as plain values."""
    return {"scores": [asdict(s) for s in scores(answers)], "answers": [asdict(a) for a in answers]}
