"""Pretraining: tokens in, a trained model out.

llmtrain train -c configs/quickstart.yaml --train.steps 200
torchrun --nproc-per-node 8 -m llmtrain train -c configs/llama3_8b.yaml
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmtrain.config.arguments import parse_run_arguments
from llmtrain.config.run import RunConfig
from llmtrain.data.check import check_inputs
from llmtrain.layout.mesh import MeshShape
from llmtrain.layout.steps import Phase, StepPlan
from llmtrain.stages.registry import stage, start
from llmtrain.tools.launch import is_launched


def main(argv: list[str], *, verb: str = "train", description: str = "") -> int:
    """`llmtrain train`, or another stage that trains: check all that a user can get wrong, then run here or start the local ranks."""
    loaded, options = parse_run_arguments(argv, verb=verb, description=description)
    chosen = stage(verb)
    cfg = chosen.settle(loaded.run)
    if options.dry_run:
        from llmtrain.stages.dry_run import dry_run

        return dry_run(cfg)
    if is_launched():
        return chosen.run(cfg)
    ranks = chosen.check(cfg)
    return chosen.run(cfg) if ranks == 1 else start(cfg, [verb, *argv], ranks)


def settled(cfg: RunConfig) -> RunConfig:
    """`cfg` with train.epochs as steps, which follow from the data. Raises DataError if this cannot be read."""
    epochs = cfg.train.epochs
    if epochs is None:
        return cfg
    data = training_data(cfg, seq_len=cfg.train.seq_len, samples=None, seed=cfg.seed)
    steps = max(1, math.ceil(epochs * len(data) / cfg.train.global_batch))
    return cfg.model_copy(update={"train": cfg.train.model_copy(update={"steps": steps, "epochs": None})})


def preflight(cfg: RunConfig) -> int:
    """Check what can be known to be wrong before any rank starts; returns the local ranks to start. Raises UserError or DataError."""
    check_inputs(cfg)
    plan = StepPlan.from_config(cfg)
    from llmtrain.device import select
    from llmtrain.model.family import check_family
    from llmtrain.parallel.check import check_parallel
    from llmtrain.stages.pretrained import check_base
    from llmtrain.stages.results import check_export
    from llmtrain.stages.session import ranks_wanted
    from llmtrain.train.stopping import StopRequest

    device = select(cfg.device)  # refuses a device that is not usable here
    check_family(cfg.model.family)
    check_export(cfg)
    check_base(cfg)
    ranks = ranks_wanted(cfg)
    check_parallel(with_vocabulary(cfg), MeshShape.from_config(cfg.parallel, world=ranks), plan, device=device.kind)
    with StopRequest(cfg.guards):  # refuses a deadline that has passed
        return ranks


def run(cfg: RunConfig, *, objective: Callable[[dict], Any] | None = None) -> int:
    """Train as `cfg` says; called on every rank. Returns the exit code: 0 done, 2 stopped after saving, 3 stopped by a guard.

    objective: what is minimised, from the model's outputs (docs/interfaces.md, Objectives); the summed cross-entropy if not given.
    """
    from llmtrain.model.objective import cross_entropy
    from llmtrain.parallel.check import check_parallel
    from llmtrain.stages.pretrained import check_base, loader
    from llmtrain.stages.results import check_export
    from llmtrain.stages.session import session
    from llmtrain.stages.source_check import check_sources
    from llmtrain.train.checkpoint import Checkpointer
    from llmtrain.train.guards import GuardStop
    from llmtrain.train.loop import Loop
    from llmtrain.train.metrics import build_sinks
    from llmtrain.train.stopping import StopRequest

    cfg = with_vocabulary(cfg)
    check_export(cfg)
    check_base(cfg)
    plan = StepPlan.from_config(cfg)
    with StopRequest(cfg.guards) as stop, session(cfg) as s:
        check_parallel(cfg, s.mesh.shape, plan, device=s.device.kind)
        if s.mesh.rank == 0:
            s.introduce()
        stop.folder = s.folder.path
        data = inputs(cfg)
        for note in check_sources(cfg, lambda: data.dataset_of(plan.phases[0]), mesh=s.mesh, folder=s.folder.path):
            s.console.message(note)
        engine = s.build_engine(objective or cross_entropy)
        sinks = []
        if s.mesh.rank == 0:
            sinks = build_sinks(cfg.metrics, s.folder.path, cfg.model_dump(mode="json"), say=s.console.message)
        checkpointer = Checkpointer(s.folder.path, cfg.checkpoint, log=s.console.message)
        loop = Loop(
            cfg,
            engine=engine,
            plan=plan,
            inputs=data,
            mesh=s.mesh,
            device=s.device,
            folder=s.folder,
            checkpointer=checkpointer,
            sinks=sinks,
            console=s.console,
            start_from=loader(s, engine),
        )
        try:
            code = loop.run(stop)
            if code == 0:
                code = finish(s, engine, loop.validation)
        except GuardStop as guard:
            s.console.message(f"stopped by a guard: {guard}")
            code = 3
        finally:
            checkpointer.wait()
            close(sinks, say=s.console.message)
        if code == 0 and checkpointer.failed:
            s.console.message(f"the last checkpoint could not be written: {checkpointer.failed}")
            code = 1
    return code


def with_vocabulary(cfg: RunConfig) -> RunConfig:
    """`cfg` with model.vocab_size filled in from the tokenizer."""
    if cfg.model.vocab_size is not None or cfg.tokenizer.path is None:
        return cfg
    from llmtrain.data.tokenizer import load

    size = load(cfg.tokenizer.path, cfg.tokenizer.kind).vocab_size
    return cfg.model_copy(update={"model": cfg.model.model_copy(update={"vocab_size": size})})


def training_data(cfg: RunConfig, *, seq_len: int, samples: int | None, seed: int, mix: dict[str, float] | None = None):
    """data.train as a dataset of `samples` samples, or of one pass if None."""
    from llmtrain.data.dataset import build_dataset

    data, shared = cfg.data, shared_options(cfg)
    return build_dataset(data.train, seq_len=seq_len, samples=samples, seed=seed, weights=mix, shuffle=data.shuffle, **shared)


def shared_options(cfg: RunConfig) -> dict[str, Any]:
    """What all datasets of a run are built with."""
    return {"document_mask": cfg.data.document_mask, "cache": cfg.data.cache, "tokenizer": cfg.tokenizer}


def inputs(cfg: RunConfig):
    """The datasets of a run: training by phase, each with its own seed and mix, and validation by source name."""
    from llmtrain.data.dataset import build_dataset
    from llmtrain.train.loop import Inputs

    def dataset_of(phase: Phase):
        return training_data(cfg, seq_len=phase.seq_len, samples=phase.samples, seed=cfg.seed + phase.index, mix=phase.mix)

    validation = {
        source.label: build_dataset([source], seq_len=cfg.train.seq_len, samples=None, seed=cfg.seed, shuffle=False, **shared_options(cfg))
        for source in cfg.data.validation
    }
    return Inputs(dataset_of=dataset_of, validation=validation)


def close(sinks: list, *, say) -> None:
    """Close the metric sinks; a disk that is full by now must not hide how the run ended."""
    for sink in sinks:
        try:
            sink.close()
        except OSError as error:
            say(f"metrics cannot be written to their end: {error}")


def finish(s, engine, losses: dict[str, float]) -> int:
    """After the last step: a sampled passage, the export, the report, and where they are. Called by all ranks; returns the exit code."""
    from llmtrain.stages.results import export, passage

    sample = passage(s, engine)
    try:
        exported = export(s, engine)
        if s.mesh.rank == 0:
            summarise(s, losses, sample=sample, exported=exported)
    except OSError as error:
        s.console.message(f"the run's results cannot be written: {error}; its checkpoints are whole, `llmtrain report` makes the report")
        return 1
    return 0


def summarise(s, losses: dict[str, float], *, sample: str | None, exported: Path | None) -> None:
    """Write the report and say what came out and where it is."""
    from llmtrain.stages.results import baseline
    from llmtrain.tools.report import write_report

    bigram = baseline(s.cfg)
    report = write_report(s.folder.path, {"sample": sample, "bigram": bigram, "export": exported})
    say = s.console.message
    for source, loss in losses.items():
        say(f"validation loss on {source}: {loss:.4f} nats/token")
    if bigram is not None:
        say(f"an interpolated bigram model of the same tokens: {bigram:.4f} nats/token")
    if sample is not None:
        say(f"a passage by the model:\n\n{sample}\n")
    say(f"run folder: {s.folder.path}")
    say(f"report:     {report}")
    if exported:
        say(f"weights:    {exported}")
