"""What `llmtrain gap` measures between steps: the same items in the same batches for every run, shared out among the ranks."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from llmtrain.config.run import RunConfig
from llmtrain.data.inputs import ReadOptions
from llmtrain.data.tokenizer import Tokenizer
from llmtrain.device.dtypes import torch_dtype
from llmtrain.engine.base import Engine
from llmtrain.errors import UserError
from llmtrain.model.scoring import cross_entropy_sum
from llmtrain.parallel.mesh import Mesh
from llmtrain.stages.gap_texts import read_texts
from llmtrain.stages.results import full_weights
from llmtrain.tools import dialogue
from llmtrain.tools.open_model import OpenModel, empty_model, prefix_of, stop_ids_of, weights_of

Scores = dict[str, list[float]]
"""Evaluation -> a score per item."""


@dataclass(frozen=True)
class Evaluation:
    """One figure of the report, and how this rank computes its share of the items."""

    name: str
    run: Callable[[OpenModel, int, int], dict[int, float]]
    """(model, rank, ranks) -> score by item."""


class Evaluator:
    """A model to generate and score with, filled from the engine's weights before each use. Every rank holds all of it."""

    def __init__(self, cfg: RunConfig, *, mesh: Mesh, tokenizer: Tokenizer | None):
        self.mesh = mesh
        model = empty_model(cfg.model, mesh.device, torch_dtype(cfg.precision.compute))
        folder = Path(cfg.model.pretrained) if cfg.model.pretrained else None
        stop, prefix = ((tokenizer.eod_id,) if tokenizer else ()), ()
        if folder is not None and (folder / "config.json").is_file():
            stop, prefix = stop_ids_of(folder, tokenizer), prefix_of(folder, tokenizer)
        self.opened = OpenModel(model, cfg.model, tokenizer, stop, prefix)
        self.evaluations = build_evaluations(cfg, self.opened)

    def scores(self, engine: Engine) -> Scores:
        """Every item of every evaluation with the engine's present weights; called by all ranks, the same on all."""
        self._take(engine)
        place = self.mesh.rank, self.mesh.world
        mine = {evaluation.name: evaluation.run(self.opened, *place) for evaluation in self.evaluations}
        parts = self.mesh.gather(mine) if self.mesh.world > 1 else [mine]
        found = {}
        for name in mine:
            values = {index: score for part in parts for index, score in part[name].items()}
            found[name] = [values[index] for index in range(len(values))]
        return found

    @torch.no_grad()
    def _take(self, engine: Engine) -> None:
        mine = weights_of(self.opened.model)
        for name, whole in full_weights(engine, self.mesh, everywhere=True):
            if name in mine:
                mine.pop(name).copy_(whole)
        if mine:
            raise UserError(
                f"gap: {next(iter(mine))} of the model is no weight of the engine; such a model cannot be evaluated between steps"
            )


def build_evaluations(cfg: RunConfig, opened: OpenModel) -> list[Evaluation]:
    """What gap.dialogue, gap.perplexity and gap.tasks ask for. Raises UserError if that is nothing, or cannot be read."""
    found = [*_dialogue(cfg), *_perplexity(cfg, opened), *_tasks(cfg)]
    if not found:
        raise UserError("gap: nothing is measured; give gap.dialogue.file, gap.perplexity.texts or gap.tasks.names")
    return found


def _dialogue(cfg: RunConfig) -> list[Evaluation]:
    options = cfg.gap.dialogue
    if options.file is None:
        return []
    dialogues = dialogue.read(options.file, options.items)

    def run(opened: OpenModel, rank: int, ranks: int) -> dict[int, float]:
        sizes = {"max_new": options.max_new, "batch": options.batch}
        answers = dialogue.evaluate(opened, dialogues, **sizes, mine=lambda number: number % ranks == rank)
        return {index: 100 * answer.f1 for index, answer in answers.items()}

    return [Evaluation("dialogue f1", run)]


def _perplexity(cfg: RunConfig, opened: OpenModel) -> list[Evaluation]:
    options = cfg.gap.perplexity
    return [_of_text(source, _token_rows(source, options, opened)) for source in options.texts]


def _token_rows(source: str, options, opened: OpenModel) -> list[list[int]]:
    rows = []
    for text in read_texts([source], ReadOptions(split=options.split)):
        if options.items is not None and len(rows) == options.items:
            break
        tokens = opened.encode(text[: 64 * options.tokens])[: options.tokens]
        rows += [tokens] * (len(tokens) == options.tokens)
    if not rows:
        raise UserError(f"gap.perplexity: {source} has no document of {options.tokens} tokens (gap.perplexity.tokens)")
    return rows


def _of_text(source: str, rows: list[list[int]]) -> Evaluation:
    def run(opened: OpenModel, rank: int, ranks: int) -> dict[int, float]:
        found = {}
        for index in range(rank, len(rows), ranks):
            nats, count = cross_entropy_sum(opened.model, rows[index], context=len(rows[index]))
            found[index] = nats / count
        return found

    return Evaluation(f"nats {Path(source).stem or source}", run)


def _tasks(cfg: RunConfig) -> list[Evaluation]:
    options = cfg.gap.tasks
    if not options.names:
        return []
    try:
        from llmtrain.tools import lm_eval_tasks
    except ImportError as error:
        raise UserError(f"gap.tasks needs the package lm-eval, which is not installed ({error}): pip install 'llmtrain[eval]'") from error
    include = Path(options.include) if options.include else None

    def evaluation(place: int, task: str) -> Evaluation:
        def run(opened: OpenModel, rank: int, ranks: int) -> dict[int, float]:
            if place % ranks != rank:  # a task is one rank's
                return {}
            (result,) = lm_eval_tasks.run(opened, [task], include=include, limit=options.items, batch=options.batch).values()
            return {index: 100 * value for index, value in enumerate(result["items"]["acc"])}

        return Evaluation(f"accuracy {Path(task).stem}", run)

    return [evaluation(place, task) for place, task in enumerate(options.names)]
