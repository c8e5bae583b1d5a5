"""Answers in dialogues, scored by the words that they share with the real one.

    llmtrain eval models/smollm2 dialogue dialogues.jsonl

A line of the file is {"turns": ["Hi!", "Hello, how are you?", "Fine. And you?"], "response": "Very well."}.
"""

import json
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from llmtrain.errors import UserError
from llmtrain.model.decode import Decoder
from llmtrain.model.sampling import Sampling
from llmtrain.tools.completions import Request, runner_for
from llmtrain.tools.open_model import OpenModel
from llmtrain.tools.progress import Progress

ARTICLES = re.compile(r"\b(a|an|the)\b")
STOP = "\n"
"""Ends an answer: the next line is another speaker's."""


class Dialogue(NamedTuple):
    """What was said, in turns, and what was answered."""

    turns: tuple[str, ...]
    response: str


class Answer(NamedTuple):
    """A model's answer and its unigram F1, from 0 to 1."""

    text: str
    f1: float


def read(path: str | Path, limit: int | None = None) -> list[Dialogue]:
    """The (first) dialogues of a file of JSON lines; raises UserError with the line that is none."""
    found: list[Dialogue] = []
    with Path(path).open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if limit is not None and len(found) == limit:
                break
            if line.strip():
                found.append(_parse(line, f"{path}, line {number}"))
    if not found:
        raise UserError(f"{path}: holds no dialogue")
    return found


def _parse(line: str, where: str) -> Dialogue:
    try:
        value = json.loads(line)
        turns, response = value["turns"], value["response"]
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f'{where}: not a JSON object with `turns` and `response`, such as {{"turns": ["Hi!"], "response": "Hello."}}'
        ) from None
    if not isinstance(turns, list) or not turns or not all(isinstance(text, str) for text in [*turns, response]):
        raise UserError(f"{where}: `turns` is a list of at least one text, `response` a text")
    if not words(response):
        raise UserError(f"{where}: the response {response!r} has no word to compare")
    return Dialogue(tuple(turns), response)


def prompt(turns: Sequence[str]) -> str:
    """The turns as lines of `User 1:` and `User 2:`, up to the colon of who speaks next."""
    lines = [f"User {1 + place % 2}: {' '.join(text.split())}" for place, text in enumerate(turns)]
    return "\n".join([*lines, f"User {1 + len(turns) % 2}:"])


def words(text: str) -> list[str]:
    """Lower-case words without punctuation and articles, as ParlAI compares them."""
    plain = "".join(c for c in text.lower() if c not in string.punctuation)
    return ARTICLES.sub(" ", plain).split()


def unigram_f1(answer: str, reference: str) -> float:
    """Harmonic mean of the shares of words that the answer has in common with the reference and the reference with the answer."""
    ours, theirs = Counter(words(answer)), Counter(words(reference))
    common = (ours & theirs).total()
    return 2 * common / (ours.total() + theirs.total()) if common else 0.0


def evaluate(
    opened: OpenModel,
    dialogues: Sequence[Dialogue],
    *,
    max_new: int = 32,
    batch: int = 16,
    mine: Callable[[int], bool] = lambda number: True,
    done: Callable[[int], None] = lambda count: None,
) -> dict[int, Answer]:
    """Greedy answers by the dialogue's index, those of the batches for which `mine(number of the batch)`.

    Which dialogues share a batch follows from their prompts alone, and a row stays in its batch until all have ended: so a base model and
    a treated one compute in the same shapes, and what differs between their scores is not the batching.
    """
    room = opened.cfg.max_seq_len - max_new
    prompts = [opened.encode(prompt(dialogue.turns))[-room:] for dialogue in dialogues]
    order = sorted(range(len(prompts)), key=lambda index: (-len(prompts[index]), index))
    answers: dict[int, Answer] = {}
    for number, start in enumerate(range(0, len(order), batch)):
        if not mine(number):
            continue
        rows = order[start : start + batch]
        for index, text in zip(rows, _answers(opened, [prompts[index] for index in rows], max_new)):
            answers[index] = Answer(text, unigram_f1(text, dialogues[index].response))
        done(len(answers))
    return answers


def _answers(opened: OpenModel, prompts: list[list[int]], max_new: int) -> list[str]:
    """Greedy answers of a batch; rows that have ended go on unread until the last has."""
    requests = [Request(tokens, Sampling(max_new=max_new, temperature=0.0)) for tokens in prompts]
    decoder = Decoder(runner_for(opened, requests, batch=len(requests)))
    rows = [decoder.add(request.prompt, request.sampling) for request in requests]
    ended: list[str | None] = [None] * len(rows)
    while None in ended and decoder.step():
        ended = [text if text is not None else _ended(opened, row) for text, row in zip(ended, rows)]
    return [text or "" for text in ended]


def _ended(opened: OpenModel, row) -> str | None:
    """The answer, if it has ended: at a stop token, a line's end, or its longest length."""
    new = row.new
    stop = next((place for place, token in enumerate(new) if token in opened.stop_ids), None)
    text = opened.need_tokenizer().decode(new[:stop]).lstrip(" ")
    return text.split(STOP)[0].strip() if stop is not None or STOP in text or row.finished else None


def run(opened: OpenModel, path: str | Path, *, limit: int | None = None, max_new: int = 32, batch: int = 16) -> dict:
    """Results as `llmtrain eval MODEL dialogue` writes them: F1 x 100, its standard error, and every item."""
    from llmtrain.tools.paired import standard_error

    if max_new < 1 or batch < 1 or max_new >= opened.cfg.max_seq_len:
        raise UserError(f"--max-new {max_new}, --batch {batch}: at least 1, --max-new below model.max_seq_len {opened.cfg.max_seq_len}")
    dialogues = read(path, limit)
    with Progress("dialogues", len(dialogues), "answers") as progress:
        answers = evaluate(opened, dialogues, max_new=max_new, batch=batch, done=progress.at)
    scores = [100 * answers[index].f1 for index in range(len(dialogues))]
    items = [{"answer": answers[index].text, "f1": score} for index, score in enumerate(scores)]
    head = {"file": str(path), "max_new": max_new, "batch": batch, "dialogues": len(dialogues)}
    return head | {"f1": sum(scores) / len(scores), "f1_stderr": standard_error(scores), "items": items}


def table(results: dict) -> str:
    """The results as a Markdown table."""
    row = f"| {results['file']} | {results['dialogues']:,} | {results['f1']:.2f} | {results['f1_stderr']:.2f} |"
    return "\n".join(["| dialogues | answers | unigram F1 x 100 | +/- |", "|---|--:|--:|--:|", row])
