"""MetaLadder (arXiv 2503.14891): train on problems with analogous ones, ask, and in rounds of self-evolve learn from right answers.

llmtrain data metaladder --out data/ladder
llmtrain metaladder -c examples/metaladder/base.yaml --metaladder.rounds 1

A round is a run of its own in the stage's folder, by the loop of pretraining; between rounds every rank answers its share of the problems
with the model of the round. What is there already, of a round or of its answers, is not done again.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmtrain.config.run import RunConfig
from llmtrain.data.errors import DataError
from llmtrain.data.metaladder.build import asked_of, rungs_of
from llmtrain.data.metaladder.problem import Rung, read_lines, write_lines
from llmtrain.data.metaladder.render import examples
from llmtrain.errors import UserError


def preflight(cfg: RunConfig) -> int:
    """Check what can be known to be wrong, which needs the first round's examples: they are written. Returns the local ranks to start."""
    from llmtrain.stages import pretrain

    rungs = _rungs(cfg)
    if cfg.tokenizer.path is None:
        raise UserError("metaladder: problems are text; set tokenizer.path")
    if not any(name in cfg.metaladder.sets for name in asked_of(cfg.metaladder.data)):
        raise UserError(f"metaladder.sets {cfg.metaladder.sets}: {cfg.metaladder.data} has none of them, so nothing would be asked")
    keep_examples(_file(cfg, 0), list(examples(rungs, cfg.metaladder.variant)))
    return pretrain.preflight(round_config(cfg, 0, rungs))


def settled(cfg: RunConfig) -> RunConfig:
    """The configuration as it is: every round settles its own length."""
    return cfg


def run(cfg: RunConfig, *, train: Callable[[RunConfig], int] | None = None) -> int:
    """All rounds; called on every rank. Returns the exit code of the first round that did not end well, or 0.

    train: trains as a configuration says and returns its exit code; that of pretraining if not given.
    """
    from llmtrain.stages import pretrain
    from llmtrain.stages.metaladder_answers import Asker, report

    rungs, rounds = _rungs(cfg), cfg.metaladder.rounds
    lines, history = list(examples(rungs, cfg.metaladder.variant)), []
    for number in range(rounds + 1):
        keep_examples(_file(cfg, number), lines)
        of_round = round_config(cfg, number, rungs)
        code = (train or pretrain.run)(of_round)
        if code != 0:
            return code
        asker = Asker(of_round, folder=_folder(cfg), number=number)
        found = {"round": number, "examples": len(lines), "steps": of_round.train.steps, "answers": asker.sets()}
        if number < rounds:
            added = asker.evolved(rungs, known=lines)
            found["added"], lines = len(added), lines + added
        history.append(found)
    report(_folder(cfg), history)
    return 0


def _rungs(cfg: RunConfig) -> list[Rung]:
    options = cfg.metaladder
    if options.data is None:
        raise UserError("metaladder.data is not set: the folder that `llmtrain data metaladder --out FOLDER` wrote")
    rungs = rungs_of(options.data)
    for name in (options.variant, options.tokens_of):
        if name is not None:
            next(examples(rungs[:1], name))  # refuses an unknown variant
    return rungs


def _folder(cfg: RunConfig) -> Path:
    return Path(cfg.output) / cfg.name


def _file(cfg: RunConfig, number: int) -> Path:
    return _folder(cfg) / f"round-{number}.jsonl"


def keep_examples(path: Path, lines: list[dict]) -> None:
    """Write a round's training examples, unless they are there. Raises DataError if others are: the round was begun with them."""
    if not path.is_file():
        write_lines(path, lines)  # by every rank the same, each renamed as a whole
    elif read_lines(path) != lines:
        raise DataError(f"{path}: was begun with other training examples; choose another name, or remove {path.parent}")


def training_source(path: Path) -> dict[str, Any]:
    """The data source of prompts and responses of which the responses are learnt."""
    return {"kind": "conversations", "path": str(path), "schema": "prompt_response", "template": "plain"}


def round_config(cfg: RunConfig, number: int, rungs: list[Rung]) -> RunConfig:
    """The run of one round: its examples, its folder, its length, which is `metaladder.epochs` unless `train` says one."""
    from llmtrain.stages import pretrain

    values = cfg.model_dump(mode="json")
    values |= {"output": str(_folder(cfg)), "name": f"round-{number}"}
    values["data"]["train"] = [training_source(_file(cfg, number))]
    train = cfg.train
    if train.steps is None and train.tokens is None and train.epochs is None and not train.phases:
        values["train"]["epochs"] = cfg.metaladder.epochs * token_ratio(cfg, rungs)
    return pretrain.settled(RunConfig.load(values))


def token_ratio(cfg: RunConfig, rungs: list[Rung]) -> float:
    """Tokens of the examples of `metaladder.tokens_of` over those of `metaladder.variant`; 1 if they are not to be equal."""
    options = cfg.metaladder
    if options.tokens_of is None:
        return 1.0
    from llmtrain.data.tokenizer import load

    encode = load(cfg.tokenizer.path, cfg.tokenizer.kind).encode

    def tokens(variant: str) -> int:
        return sum(len(encode(line["prompt"] + line["response"])) + 1 for line in examples(rungs, variant))

    return tokens(options.tokens_of) / tokens(options.variant)
