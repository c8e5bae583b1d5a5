"""Gradient Ascent Post-training (GAP, arXiv 2306.07052): a few optimizer steps up the loss of one text, for many texts, measured.

llmtrain gap -c gap.yaml
"""

import time
from contextlib import suppress

import torch

from llmtrain.config.run import RunConfig
from llmtrain.data.check import check_inputs
from llmtrain.engine.base import Engine, StepResult
from llmtrain.errors import UserError
from llmtrain.layout.mesh import MeshShape
from llmtrain.layout.steps import StepPlan
from llmtrain.model.objective import ascent
from llmtrain.parallel.fsdp import local_tensor
from llmtrain.stages.gap_evaluation import Evaluator, Scores, build_evaluations
from llmtrain.stages.gap_results import Results, lower_is_better
from llmtrain.stages.gap_texts import OneText, Text, gather_texts
from llmtrain.stages.pretrain import with_vocabulary
from llmtrain.stages.session import Session, ranks_wanted, session
from llmtrain.train.console import duration
from llmtrain.train.guards import GuardStop
from llmtrain.train.loop import STOPPED, Inputs, Loop
from llmtrain.train.metrics import build_sinks
from llmtrain.train.run_folder import RunFolder
from llmtrain.train.stopping import StopRequest

PAPER = {
    "optim": {"lr": 5e-5, "betas": (0.9, 0.98), "eps": 1e-8, "weight_decay": 0.0, "max_grad_norm": None},
    "schedule": {"kind": "constant"},
    "train": {"steps": 15, "seq_len": 512, "micro_batch": 1},
}
"""What the paper's code does, where the configuration says nothing else. There is no dropout in these models."""
STRIKES, FIRST_STRIKE = 2, 5
"""The paper's early stop: at the second evaluation, from step 5 on, that is below the best in all scores."""


def settled(cfg: RunConfig) -> RunConfig:
    """`cfg` with the paper's settings where it gives none, and a batch that gives every data-parallel rank a sample (see OneText)."""
    ranks = ranks_wanted(cfg)
    given = {name: {key: getattr(getattr(cfg, name), key) for key in getattr(cfg, name).model_fields_set} for name in PAPER}
    for option in ("tokens", "phases"):
        if given["train"].get(option):
            raise UserError(f"train.{option}: `llmtrain gap` takes train.steps on every text")
    sections = {name: values | given[name] for name, values in PAPER.items()}
    micro = sections["train"]["micro_batch"]
    batch = MeshShape.from_config(cfg.parallel, world=ranks).dp * micro
    if given["train"].get("global_batch", batch) not in (1, batch):
        raise UserError(f"train.global_batch {given['train']['global_batch']}: `llmtrain gap` steps on one text; leave it out")
    sections["train"] |= {"global_batch": batch, "steps": sections["train"]["steps"] or PAPER["train"]["steps"]}
    updated = {name: type(getattr(cfg, name)).model_validate(values) for name, values in sections.items()}
    return with_vocabulary(cfg.model_copy(update=updated))


def preflight(cfg: RunConfig) -> int:
    """Check what can be known to be wrong before any rank starts; returns the local ranks to start. Raises UserError or DataError."""
    from llmtrain.device import select
    from llmtrain.parallel.check import check_parallel
    from llmtrain.stages.results import check_export
    from llmtrain.tools.open_model import OpenModel

    wrong = next((step for step in cfg.gap.evaluate_at if step > cfg.train.steps), None)
    if wrong is not None:
        raise UserError(f"gap.evaluate_at: step {wrong} is beyond train.steps {cfg.train.steps}")
    if cfg.data.train or cfg.data.validation:
        check_inputs(cfg)
    check_export(cfg)
    ranks = ranks_wanted(cfg)
    shape = MeshShape.from_config(cfg.parallel, world=ranks)
    check_parallel(cfg, shape, StepPlan.from_config(cfg), device=select(cfg.device).kind)
    tokenizer = load_tokenizer(cfg)
    gather_texts(cfg, tokenizer)
    names = [e.name for e in build_evaluations(cfg, OpenModel(None, cfg.model, tokenizer))]
    if cfg.gap.select is not None and cfg.gap.select not in names:
        raise UserError(f"gap.select {cfg.gap.select!r} is not measured; allowed are {', '.join(names)}")
    with StopRequest(cfg.guards):
        return ranks


def load_tokenizer(cfg: RunConfig):
    """The run's tokenizer; None without one."""
    from llmtrain.data.tokenizer import load

    return load(cfg.tokenizer.path, cfg.tokenizer.kind) if cfg.tokenizer.path else None


def run(cfg: RunConfig) -> int:
    """Ascend on every text that has no result yet, then report; called on every rank. Returns the exit code: 0 done, 2 stopped."""
    with StopRequest(cfg.guards) as stop, session(cfg) as s:
        stop.folder = s.folder.path
        if s.mesh.rank == 0:
            s.introduce()
        sweep = Sweep(s, stop)
        code = sweep.run()
        if code == 0:
            sweep.finish()
    return code


class Base:
    """The weights that every run starts from, kept on the host, this rank's part."""

    def __init__(self, engine: Engine):
        state = engine.state()
        self._weights = {name: local_tensor(t).detach().to("cpu", copy=True) for name, t in state.items() if name.endswith(".weight")}
        self._extra = engine.extra_state()

    @torch.no_grad()
    def restore(self, engine: Engine) -> None:
        """Put them back bit for bit, with moments at zero and no step taken."""
        state = engine.state()
        for name, tensor in state.items():
            mine = local_tensor(tensor)
            mine.copy_(self._weights[name]) if name in self._weights else mine.zero_()
        engine.load_state(state)
        engine.load_extra_state(self._extra)


class Sweep:
    """Runs over many texts with one engine."""

    def __init__(self, s: Session, stop: StopRequest):
        from llmtrain.stages.pretrained import loader

        self.s, self.stop, self.cfg, self.say = s, stop, s.cfg, s.console.message
        tokenizer = load_tokenizer(s.cfg)
        self.texts = gather_texts(s.cfg, tokenizer)
        self.results = Results(s.folder.path, s.cfg)
        self.results.load()
        self.engine = s.build_engine(ascent)
        self.engine.begin_phase(rope_base=s.cfg.model.position.base)
        if (load := loader(s, self.engine)) is not None:
            load()
        self.base = Base(self.engine)
        self.evaluator = Evaluator(s.cfg, mesh=s.mesh, tokenizer=tokenizer)
        self.seconds: list[float] = []

    def run(self) -> int:
        """All texts; 0, or STOPPED."""
        if self.results.base is None:
            started = time.perf_counter()
            self.results.base = self.evaluator.scores(self.engine)
            self._write()
            self._estimate(time.perf_counter() - started)
        left = [text for text in self.texts if text.key not in self.results.runs]
        if len(left) < len(self.texts):
            self._say(f"{len(self.texts) - len(left)} of {len(self.texts)} texts have their results already")
        for place, text in enumerate(left):
            started = time.perf_counter()
            found = Ascent(self, text, self.stop).run()
            if found is None:
                self._say(f"stopped amid {text.key}; the same command goes on with it")
                return STOPPED
            self.seconds.append(time.perf_counter() - started)
            self.results.runs[text.key] = found | {"seconds": round(self.seconds[-1], 2)}
            self._write()
            self._progress(text, found, left=len(left) - place - 1)
            if place + 1 < len(left) and self.s.mesh.any(self.stop.should_stop() is not None):
                self._say(f"stopped after {text.key}; the same command goes on from here")
                return STOPPED
        return 0

    def _estimate(self, seconds: float) -> None:
        """What the untreated model scored, and how long the runs will measure at that speed; their steps come on top."""
        count = len([step for step in self.cfg.gap.evaluate_at if step])
        words = f"untreated: {means(self.results.base)}, measured in {seconds:.1f} s"
        self._say(
            f"{words}; {len(self.texts)} texts x {count} evaluations will take {duration(len(self.texts) * count * seconds)}, and the steps"
        )

    def _progress(self, text: Text, found: dict, *, left: int) -> None:
        done, eta = len(self.texts) - left, sum(self.seconds) / len(self.seconds) * left
        loss = f"cross-entropy {found['losses'][0]:.3f} to {found['losses'][-1]:.3f}"
        last = found["steps"].get(max(found["steps"], key=int, default=""), self.results.base)
        words = f"{found['ended']}, {means(last)}, {self.seconds[-1]:.1f} s"
        self._say(f"text {done}/{len(self.texts)} ({text.source} {text.index}): {loss}, {words}; about {duration(eta)} to go")

    def _write(self) -> None:
        if self.s.mesh.rank == 0:
            self.results.write()

    def _say(self, text: str) -> None:
        if self.s.mesh.rank == 0:
            self.say(text)

    def finish(self) -> None:
        """The report, and the chosen weights if checkpoint.export asks for them."""
        from llmtrain.stages import gap_report
        from llmtrain.stages.results import export

        if self.s.mesh.rank == 0:
            print(gap_report.write(self.s.folder.path, control=self.cfg.gap.control))
        if self.cfg.checkpoint.export != "none":
            self._ascend_to_best()
            folder = export(self.s, self.engine)
            self._say(f"weights: {folder}")

    def _ascend_to_best(self) -> None:
        """Take the steps of the best run by the selection half again: its weights were not kept."""
        from llmtrain.stages.gap_report import best_run

        name = self.cfg.gap.select or self.evaluator.evaluations[0].name
        runs = [self.results.runs[text.key] for text in self.texts]
        key, step = best_run(self.results.base[name], runs, name)
        text = next((text for text in self.texts if text.key == key), None)
        self._say(f"best by {name} on the selection half: {key or 'the untreated model'}, step {step}")
        if text is None:
            self.base.restore(self.engine)
        else:
            Ascent(self, text, self.stop, until=step).run()


def means(scores: Scores) -> str:
    """Every evaluation's mean, in words."""
    return ", ".join(f"{name} {sum(values) / len(values):.3f}" for name, values in scores.items())


class Ascent:
    """One run on one text: the loop with the ascent objective, evaluations and guards in between."""

    def __init__(self, sweep: Sweep, text: Text, stop: StopRequest, *, until: int | None = None):
        """`until`: take so many steps and measure nothing."""
        self.sweep, self.text, self.stop, self.until = sweep, text, stop, until
        self.losses: list[float] = []
        self.steps: dict[str, Scores] = {}
        self.ended, self.strikes = "done", 0

    def run(self) -> dict | None:
        """The run's line of results; None if it was stopped from outside."""
        sweep, s = self.sweep, self.sweep.s
        folder = RunFolder(s.folder.path / "texts" / self.text.key)
        if s.mesh.rank == 0:
            folder.path.mkdir(parents=True, exist_ok=True)
        metrics = s.cfg.metrics.model_copy(update={"tensorboard": False, "wandb": None, "swanlab": None, "profile": None})
        sinks = build_sinks(metrics, folder.path, {}, say=sweep.say) if s.mesh.rank == 0 else []
        try:
            code = self._loop(folder, sinks).run(self.stop)
        except GuardStop as guard:
            code, self.ended = 0, f"diverged: {guard}"
        finally:
            for sink in sinks:
                with suppress(OSError):
                    sink.close()
        if code == STOPPED:
            return None
        head = {"kind": "run", "key": self.text.key, "source": self.text.source, "index": self.text.index, "tokens": len(self.text.tokens)}
        return head | {"ended": self.ended, "losses": self.losses, "steps": self.steps}

    def _loop(self, folder: RunFolder, sinks: list) -> Loop:
        sweep, s = self.sweep, self.sweep.s
        cfg = s.cfg
        if self.until:
            cfg = cfg.model_copy(update={"train": cfg.train.model_copy(update={"steps": self.until})})
        data = OneText(self.text.tokens, seq_len=cfg.train.seq_len, batch=cfg.train.global_batch)
        shared = {"engine": sweep.engine, "mesh": s.mesh, "device": s.device, "console": s.console}
        return Loop(
            cfg,
            plan=StepPlan.from_config(cfg),
            inputs=Inputs(dataset_of=lambda phase: data, validation={}),
            folder=folder,
            checkpointer=None,
            sinks=sinks,
            start_from=lambda: sweep.base.restore(sweep.engine),
            between=self._between,
            **shared,
        )

    def _between(self, done: int, result: StepResult) -> bool:
        """After a step: its loss, which is that before the step; guards; an evaluation that is due. True ends the run."""
        self.losses.append(-result.loss)  # the objective is minus the cross-entropy
        if self.until is not None:
            return False
        if (reason := self._diverged()) is not None:
            self.ended = f"diverged: {reason}"
            return True
        if done not in self.sweep.cfg.gap.evaluate_at:
            return False
        self.steps[str(done)] = self.sweep.evaluator.scores(self.sweep.engine)
        if self.sweep.cfg.gap.early_stop and done >= FIRST_STRIKE and self._below_the_best():
            self.strikes += 1
        if self.strikes == STRIKES:
            self.ended = f"early: every score below its best twice, at step {done}"
        return self.strikes == STRIKES

    def _diverged(self) -> str | None:
        gap, loss, first = self.sweep.cfg.gap, self.losses[-1], self.losses[0]
        if gap.max_loss is not None and loss > gap.max_loss:
            return f"a cross-entropy of {loss:.3f} at step {len(self.losses)} exceeds gap.max_loss {gap.max_loss:g}"
        if gap.max_rise is not None and loss - first > gap.max_rise:
            return f"the cross-entropy rose by {loss - first:.3f} until step {len(self.losses)}, more than gap.max_rise {gap.max_rise:g}"
        return None

    def _below_the_best(self) -> bool:
        earlier = [self.sweep.results.base, *list(self.steps.values())[:-1]]
        return all(below_best(name, values, [scores[name] for scores in earlier]) for name, values in self._last().items())

    def _last(self) -> Scores:
        return list(self.steps.values())[-1]


def below_best(name: str, values: list[float], earlier: list[list[float]]) -> bool:
    """Whether the mean of `values` is worse than the best of the means before."""
    sign = -1 if lower_is_better(name) else 1
    return sign * sum(values) / len(values) < max(sign * sum(scores) / len(scores) for scores in earlier)
