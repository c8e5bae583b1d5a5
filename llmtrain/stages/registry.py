"""Stages by name: the built-in ones, and those that plugins register, each of them a verb `llmtrain NAME -c FILE`."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from llmtrain.config.arguments import parse_run_arguments, plugin_names
from llmtrain.config.base import Section
from llmtrain.config.errors import ConfigError
from llmtrain.config.extend import register_section
from llmtrain.config.run import RunConfig
from llmtrain.plugins import load_plugins
from llmtrain.tools.launch import is_launched, run_local


@dataclass(frozen=True)
class Stage:
    """A job that a run can do. Both functions take the run's configuration."""

    name: str
    run: Callable[[RunConfig], int]
    """Does the job; called on every rank, returns the exit code."""
    check: Callable[[RunConfig], object]
    """Called once, before any rank starts; raises UserError or DataError for what can be known to be wrong."""
    help: str = ""
    settle: Callable[[RunConfig], RunConfig] = lambda cfg: cfg
    """What the stage makes of the configuration first: its own defaults, and what follows from the data. Twice is as once."""


BUILT_IN = {
    "train": "llmtrain.stages.pretrain",
    "sft": "llmtrain.stages.sft",
    "gap": "llmtrain.stages.gap",
    "metaladder": "llmtrain.stages.metaladder",
}
"""Modules of the built-in stages, each with `run`, `preflight` and `settled`."""
_STAGES: dict[str, Stage] = {}


def register_stage(
    name: str, *, help: str = "", section: type[Section] | None = None, check: Callable[[RunConfig], object] | None = None
) -> Callable:
    """Decorate `run(cfg) -> exit code`, called on every rank, as the stage and verb `name`.

    help: its line in `llmtrain NAME -h`. section: its options, which become the section `name` of the configuration (as
    `config.extend.register_section`). check: see `Stage`; by default that of pretraining: data, device, mesh and batches. A stage that
    reads no data gives its own.

    A name that is a verb of llmtrain already calls that verb on the command line.

    Raises:
        ValueError: there is such a stage already.
    """

    def decorate(run: Callable[[RunConfig], int]) -> Callable[[RunConfig], int]:
        if name in BUILT_IN or (name in _STAGES and _STAGES[name].run is not run):
            raise ValueError(f"stage {name!r} exists already; choose another name")
        if section is not None:
            register_section(name, section)
        train = _built_in("train")
        _STAGES[name] = Stage(name, run, check or train.check, help, train.settle)
        return run

    return decorate


def stages() -> list[str]:
    """Names of the stages known so far."""
    return [*BUILT_IN, *_STAGES]


def stage(name: str) -> Stage:
    """The stage `name`; KeyError if there is none."""
    return _built_in(name) if name in BUILT_IN else _STAGES[name]


def _built_in(name: str) -> Stage:
    def call(function: str) -> Callable:
        return lambda cfg: getattr(importlib.import_module(BUILT_IN[name]), function)(cfg)

    return Stage(name, call("run"), call("preflight"), settle=call("settled"))


def find_verb(name: str, argv: list[str]) -> Callable[[list[str]], int] | None:
    """The verb of a stage that an installed plugin, or one that the configuration in `argv` names, registers; None if there is none."""
    if name not in _STAGES:
        try:
            load_plugins(plugin_names(argv))
        except ConfigError:  # a wrong file is for the verb to report, and there may be no such verb
            load_plugins([])
    return (lambda words: main(name, words)) if name in _STAGES else None


def main(name: str, argv: list[str]) -> int:
    """`llmtrain NAME -c FILE ...`: check, then run here or start the local ranks."""
    chosen = stage(name)
    loaded, options = parse_run_arguments(argv, verb=name, description=chosen.help)
    cfg = chosen.settle(loaded.run)
    if is_launched():
        return chosen.run(cfg)
    ranks = prepare(chosen, cfg)
    if options.dry_run:
        print(f"{name}: checked, nothing wrong found; {ranks} local rank(s)")
        return 0
    return chosen.run(cfg) if ranks == 1 else start(cfg, [name, *argv], ranks)


def prepare(chosen: Stage, cfg: RunConfig) -> int:
    """Check `cfg` for a stage; returns the local ranks to start."""
    from llmtrain.device import select
    from llmtrain.stages.session import ranks_wanted

    select(cfg.device)  # refuses a device that is not usable here
    chosen.check(cfg)
    return ranks_wanted(cfg)


def start(cfg: RunConfig, argv: list[str], ranks: int) -> int:
    """Run `llmtrain ARGV` on local ranks whose output goes to the run folder; returns the exit code."""
    return run_local(argv, ranks, logs=Path(cfg.output) / cfg.name / "log")
