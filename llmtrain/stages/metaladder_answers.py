"""What the rounds of MetaLadder ask their models: each rank a share of the problems, whose answers meet in files."""

import json
import os
import time
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

from llmtrain.config.run import RunConfig
from llmtrain.data.metaladder.build import asked_of
from llmtrain.data.metaladder.problem import Problem, Rung
from llmtrain.data.metaladder.render import REVERSE, prompt
from llmtrain.tools.launch import is_launched
from llmtrain.tools.problems import Answered, as_json, score, solve

POLL = 0.2
"""Seconds between looks at what the other ranks have written."""


class Asker:
    """Asks the model of one round.

    cfg: the round's own configuration. folder: the stage's, for the answers. number: of the round.
    """

    def __init__(self, cfg: RunConfig, *, folder: Path, number: int):
        self._cfg, self._folder, self._number = cfg, folder / "answers", number
        self._rank, self._world, self._local = (int(os.environ[name]) for name in PLACES) if is_launched() else (0, 1, 0)

    def sets(self) -> dict[str, dict[str, dict]]:
        """Scores by set of problems and inference."""
        options, found = self._cfg.metaladder, {}
        for name, problems in asked_of(options.data).items():
            if name in options.sets:
                found[name] = {how: asdict(score(self._ask(name, problems, how))) for how in options.inference}
        return found

    def evolved(self, rungs: list[Rung], *, known: list[dict]) -> list[dict]:
        """Training examples from the right answers to the training problems, without those that are known already."""
        options = self._cfg.metaladder
        problems = [rung.problem for rung in rungs]
        if options.variant.endswith(REVERSE):
            problems += [rung.swapped().problem for rung in rungs]
        answers = self._ask("train", problems, options.sampling)
        have = {(line["prompt"], line["response"]) for line in known}
        lines = [_example(p, a, options.variant, self._number) for p, a in zip(problems, answers) if a.correct and a.finished == "stop"]
        return [line for line in lines if (line["prompt"], line["response"]) not in have]

    def _ask(self, name: str, problems: list[Problem], inference: str) -> list[Answered]:
        whole = self._folder / f"round-{self._number}-{name}-{inference}.json"
        if not whole.is_file():
            share = problems[self._rank :: self._world]
            answers = self._solve(share, inference) if share else []
            self._write(self._part(whole, self._rank), {"answers": [asdict(a) for a in answers]})
            self._meet(whole, len(problems))
        return [Answered(**values) for values in json.loads(whole.read_text(encoding="utf-8"))["answers"]]

    def _solve(self, problems: list[Problem], inference: str) -> list[Answered]:
        options = self._cfg.metaladder
        return solve(self._opened, problems, inference=inference, max_new=options.max_new, batch=options.batch)

    @cached_property
    def _opened(self):
        from llmtrain.device import select
        from llmtrain.tools.open_model import open_model

        device = select(self._cfg.device, self._local)
        dtype = "auto" if device.kind == "cpu" else self._cfg.precision.compute
        path = Path(self._cfg.output) / self._cfg.name
        return open_model(path, device=device.kind, dtype=dtype, local_rank=self._local)

    def _part(self, whole: Path, rank: int) -> Path:
        return whole.with_name(f"{whole.stem}.{rank}-of-{self._world}.json")

    def _meet(self, whole: Path, count: int) -> None:
        """Put the ranks' parts together (the first rank), or wait until that is done. Ranks that fail are seen by what launched them."""
        parts = [self._part(whole, rank) for rank in range(self._world)]
        while not (whole.is_file() if self._rank else all(part.is_file() for part in parts)):
            time.sleep(POLL)
        if self._rank:
            return
        answers: list[Any] = [None] * count
        for rank, part in enumerate(parts):
            answers[rank :: self._world] = json.loads(part.read_text(encoding="utf-8"))["answers"]
        self._write(whole, as_json([Answered(**values) for values in answers]))
        for part in parts:
            part.unlink()

    def _write(self, path: Path, values: dict) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f"{path.name}.{self._rank}.partial")
        aside.write_text(json.dumps(values, ensure_ascii=False), encoding="utf-8")
        aside.replace(path)


PLACES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


def _example(problem: Problem, answer: Answered, variant: str, number: int) -> dict:
    texts = {"prompt": prompt(problem.question), "response": answer.text.strip()}
    known = {"id": f"evolved-{number}-{problem.id}", "template": problem.template, "split": "train", "variant": variant}
    return texts | known | {"answer": problem.answer}


def report(folder: Path, history: list[dict]) -> None:
    """Write results.json and results.md, and print the table; the first rank alone."""
    if is_launched() and int(os.environ["RANK"]):
        return
    lines = ["| round | examples | steps | set | inference | problems | correct | standard error | tokens | seconds |"]
    lines += ["|--:|--:|--:|---|---|--:|--:|--:|--:|--:|"]
    for found in history:
        for name, ways in found["answers"].items():
            for how, s in ways.items():
                cells = f"{s['count']:,} | {s['accuracy']:.1%} | {s['error']:.1%} | {s['tokens']:.1f} | {s['seconds']:.3f}"
                lines.append(f"| {found['round']} | {found['examples']:,} | {found['steps']} | {name} | {how} | {cells} |")
    (folder / "results.json").write_text(json.dumps(history, indent=1) + "\n", encoding="utf-8")
    (folder / "results.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))
    print(f"\nanswers: {folder / 'answers'}")
