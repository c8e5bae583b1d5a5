"""The training loop: engine, guards, metrics, validation, checkpoints, in that order, once per step."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from llmtrain.config.lora import adapter_parameters
from llmtrain.config.parameters import flops_per_token
from llmtrain.config.run import RunConfig
from llmtrain.data.batch import Batch
from llmtrain.device.base import Device
from llmtrain.device.dtypes import torch_dtype
from llmtrain.engine.base import Engine, StepResult
from llmtrain.errors import UserError
from llmtrain.layout.steps import Phase, Step, StepPlan
from llmtrain.parallel.hang import where
from llmtrain.parallel.mesh import Mesh
from llmtrain.train.checkpoint import Checkpointer
from llmtrain.train.checkpoint_files import complete
from llmtrain.train.console import Console
from llmtrain.train.experts import ExpertHealth
from llmtrain.train.guards import GuardStop, SpikeDetector, check_finite
from llmtrain.train.metrics import MetricSink, SpeedMeter
from llmtrain.train.profile import StepProfiler
from llmtrain.train.run_folder import RunFolder
from llmtrain.train.stopping import StopRequest
from llmtrain.train.stream import step_stream, validation_batches

DONE, STOPPED = 0, 2


@dataclass
class Inputs:
    """Where batches come from: a dataset per phase, and the validation datasets by name."""

    dataset_of: Callable[[Phase], object]
    validation: dict[str, object]


class Loop:
    """Runs a plan with an engine. All ranks call it together; rank 0 alone writes metrics and talks."""

    def __init__(
        self,
        cfg: RunConfig,
        *,
        engine: Engine,
        plan: StepPlan,
        inputs: Inputs,
        mesh: Mesh,
        device: Device,
        folder: RunFolder,
        checkpointer: Checkpointer | None,
        sinks: list[MetricSink],
        console: Console,
        start_from: Callable[[], None] | None = None,
        between: Callable[[int, StepResult], bool] | None = None,
    ):
        """`start_from` loads weights into the engine at a fresh start; a run that resumes does not call it.

        Without a `checkpointer` nothing is saved or resumed. `between(steps taken, the last one's result)` is called on all ranks after
        every step and ends the run if it gives True, on all ranks alike.
        """
        self.start_from, self.between = start_from, between
        self.cfg, self.engine, self.plan, self.inputs, self.mesh, self.device = cfg, engine, plan, inputs, mesh, device
        self.checkpointer, self.sinks, self.console, self.folder = checkpointer, sinks, console, folder
        self.spikes = SpikeDetector(cfg.guards.spike)
        self.experts = ExpertHealth(cfg.guards.experts, cfg.model)
        self.next_step = 0
        self.loss: float | None = None
        self.result: StepResult | None = None
        self.validation: dict[str, float] = {}
        self.metrics_lost = False
        self.speed: SpeedMeter | None = None

    def run(self, stop: StopRequest) -> int:
        """Train from where the run stands to the end of the plan. Returns 0, or 2 if a signal or deadline stopped it after saving.

        Raises GuardStop when a guard says so; what was saved before stays.
        """
        self._resume()
        stream = step_stream(
            self.plan,
            start=self.next_step,
            dataset_of=self.inputs.dataset_of,
            rank=self.mesh.data_rank,
            ranks=self.mesh.shape.dp,
            depth=self.cfg.data.prefetch,
        )
        peak = self.device.peak_flops(torch_dtype(self.cfg.precision.compute)) if self.mesh.rank == 0 else None
        self.speed = SpeedMeter(peak_flops=peak, ranks=self.mesh.world)
        phase, asked = None, time.perf_counter()
        with StepProfiler(self.cfg.metrics.profile, self.folder.path, self.mesh.rank) as profiler:
            for step, micro_batches in stream:
                waited = time.perf_counter() - asked
                if step.phase is not phase:
                    phase = step.phase
                    self._begin_phase(phase)
                self._step(step, micro_batches, waited=waited)
                profiler.step(step.index)
                if self._after_step(step, stop):
                    stream.close()
                    return STOPPED
                if self._ended_between():
                    stream.close()
                    return DONE
                where.at(step=self.next_step + 1, phase="data")
                asked = time.perf_counter()
        return DONE

    # --- one step -----------------------------------------------------------------------------------------------------------------

    def _step(self, step: Step, micro_batches: list[Batch], *, waited: float) -> None:
        where.at(step=step.index + 1, phase="training")
        self.speed.start_step()
        result = self.engine.forward_backward(micro_batches)
        norm = self.engine.grad_norm()
        overflow = self.engine.overflowed()
        problem = None if overflow else check_finite(result.loss, norm)
        if problem and self.cfg.guards.non_finite == "stop":
            self.engine.discard()
            raise GuardStop(_blame(problem, step, result), samples=result.bad_samples)
        spike = None if overflow or problem else self.spikes.judge(result.loss, norm)
        skipped = overflow or bool(problem) or (spike.spike and self.cfg.guards.spike.action == "skip")
        if skipped:
            self.engine.discard()
        else:
            self.engine.apply(lr=step.lr)
        self.loss, self.next_step, self.result = result.loss, step.index + 1, result
        compiling = result.metrics.get("compile_seconds", 0.0)
        self.speed.exclude(compiling + result.metrics.get("move_seconds", 0.0))
        flops = flops_per_token(self.cfg.model, step.seq_len, adapters=adapter_parameters(self.cfg.lora, self.cfg.model))
        self.speed.end_step(tokens=step.batch * step.seq_len, flops_per_token=flops)
        self._report(step, result, norm=norm, skipped=skipped, spike=bool(spike and spike.spike), waited=waited)
        if compiling:
            self._event(step, f"compiled the blocks for sequences of {step.seq_len} tokens in {compiling:.0f} s, not counted as training")
        for text in result.events:
            self._event(step, text)
        if overflow:
            self._event(step, "fp16 gradients overflowed; step discarded, loss scale halved")
        elif problem:
            self._event(step, f"{_blame(problem, step, result)}; step discarded")
        elif spike.spike:
            self._event(step, f"spike: {spike.reason}" + ("; step discarded" if skipped else ""))
        self._watch_experts(step, result)

    def _watch_experts(self, step: Step, result: StepResult) -> None:
        self.experts.add(result)
        for finding in self.experts.judge(result):
            self._event(step, finding.text)
            if finding.stop:
                self._write_shares(step.index + 1)
                raise GuardStop(f"step {step.index + 1}: {finding.text}")

    def _report(self, step: Step, result: StepResult, *, norm: float, skipped: bool, spike: bool, waited: float) -> None:
        if self.mesh.rank or ((step.index + 1) % self.cfg.metrics.every and step.index + 1 != self.plan.steps):
            return
        memory = self.device.memory()
        values = {
            "kind": "train",
            "loss": result.loss,
            "grad_norm": norm,
            "lr": step.lr,
            "tokens": step.tokens_before + step.batch * step.seq_len,
            "targets": result.target_count,
            "samples": [step.first_sample, step.batch],
            "phase": step.phase.name,
            "seconds": self.speed.step_seconds,
            "data_seconds": waited,
            "tokens_per_second": self.speed.tokens_per_second,
            "mfu": self.speed.mfu,
            "memory_gb": memory.peak / 2**30,
            "spike": int(spike),
            "skipped": int(skipped),
            **result.metrics,
        }
        self._write(step.index + 1, values)
        eta = self.speed.eta(self.plan.tokens - values["tokens"])
        self.console.progress(step=step.index + 1, total=self.plan.steps, values=values, eta=eta)

    def _write_shares(self, done: int) -> None:
        if line := self.experts.line():
            self._write(done, line)

    def _after_step(self, step: Step, stop: StopRequest) -> bool:
        """Validation and checkpoints that are due; True if the run has to stop here."""
        train, every, done = self.cfg.train, self.cfg.checkpoint.every, step.index + 1
        last = done == self.plan.steps
        reason = stop.should_stop()
        stopping = self.mesh.any(reason is not None) and not last
        with self.speed.pause():
            due = last or (train.validate_every > 0 and done % train.validate_every == 0)
            if due or stopping:
                self._write_shares(done)
            if self.inputs.validation and not stopping and due:
                self.validation = self.validate(done, micro_batch=step.micro_batch)
            if last or stopping or (every and done % every == 0):
                self._save()
            self._poll(step)
        if stopping:
            self._event(step, f"stopped by {reason or 'another rank'} after step {done}; the same command goes on from here")
        if stopping or last:
            self._poll(step, wait=True)
        return stopping

    def _poll(self, step: Step, *, wait: bool = False) -> None:
        """Say what has become of checkpoints."""
        if self.checkpointer is None:
            return
        if wait:
            self.checkpointer.wait()
        for message in self.checkpointer.poll():
            self._event(step, message)

    def _ended_between(self) -> bool:
        if self.between is None:
            return False
        with self.speed.pause():
            return self.between(self.next_step, self.result)

    def validate(self, done: int, *, micro_batch: int) -> dict[str, float]:
        """Loss of every validation source after `done` steps."""
        losses = {}
        where.at(phase="validation")
        for name, dataset in self.inputs.validation.items():
            samples = min(self.cfg.train.validate_samples, len(dataset))
            batches = validation_batches(
                dataset, samples=samples, micro_batch=micro_batch, rank=self.mesh.data_rank, ranks=self.mesh.shape.dp
            )
            losses[name] = self.engine.evaluate(batches).loss
            self._write(done, {"kind": "validation", "source": name, "loss": losses[name]})
            self._say(f"step {done}: validation loss {losses[name]:.4f} on {name} ({samples} sequences of {dataset.seq_len} tokens)")
        return losses

    # --- phases and state ---------------------------------------------------------------------------------------------------------

    def _begin_phase(self, phase: Phase) -> None:
        self.engine.begin_phase(rope_base=phase.rope_base)
        self.device.reset_peak_memory()  # memory_gb is the peak of the phase
        if len(self.plan.phases) > 1:
            self._say(
                f"{phase.name}: {phase.steps} steps of sequences of {phase.seq_len} tokens, "
                f"{phase.tokens / 1e6:.1f}M tokens, RoPE base {phase.rope_base:g}, peak lr {phase.peak_lr:g}"
            )

    def _resume(self) -> None:
        path = None if self.checkpointer is None else self.checkpointer.find(self.cfg.checkpoint.resume)
        if path is None:
            if self.checkpointer is not None:
                self._refuse_to_start_over()
            first = self.plan.step(0)
            self._forget_metrics(0)
            self.engine.begin_phase(rope_base=first.rope_base)
            if self.start_from is not None:
                self.start_from()
                return
            measured = self.engine.calibrate(self.inputs.dataset_of(first.phase).batch(0, first.micro_batch))
            if measured:
                self._say("measured at initialisation: " + ", ".join(f"{name} {value:.4f}" for name, value in measured.items()))
            return
        state = self.engine.state()
        meta = self.checkpointer.load(path, state)
        self._check_position(path, meta)
        self.engine.load_state(state)
        self.engine.load_extra_state(meta["engine"])
        self.spikes.load_state(meta["spikes"])
        self.experts.load_state(meta.get("experts"))
        self.next_step = meta["step"]
        self._forget_metrics(meta["step"])
        self._say(f"resumed from step {meta['step']}: {meta['tokens'] / 1e6:.2f}M tokens, next sample {meta['position']} ({path})")

    def _refuse_to_start_over(self) -> None:
        """A run whose checkpoints all are damaged must not silently begin again and overwrite what is left of it."""
        folder = self.checkpointer.checkpoints
        if self.cfg.checkpoint.resume == "auto" and complete(folder):
            raise UserError(
                f"every checkpoint in {folder} is damaged; put a whole one there, set checkpoint.resume: none to start over, "
                "or choose another name (`--name`)"
            )

    def _forget_metrics(self, step: int) -> None:
        """Steps that will be run again must not be recorded twice."""
        if self.mesh.rank == 0:
            self.folder.truncate_metrics(step)

    def _check_position(self, path: Path, meta: dict) -> None:
        """The plan must put the checkpoint's step where the checkpoint's data position is."""
        step, position = meta["step"], meta["position"]
        if step > self.plan.steps:
            raise UserError(f"{path} is at step {step}, the run ends at step {self.plan.steps}; raise train.steps or choose another name")
        planned = self._position(step)
        if planned != position:
            raise UserError(
                f"{path} stands at step {step} and sample {position}, but this configuration's step {step} starts at sample {planned}: "
                "train.global_batch or train.phases changed; undo that, or set checkpoint.resume: none and another name"
            )

    def _position(self, step: int) -> int:
        if step < self.plan.steps:
            return self.plan.step(step).first_sample
        last = self.plan.step(self.plan.steps - 1)
        return last.first_sample + last.batch

    def _save(self) -> None:
        if self.checkpointer is None:
            return
        where.at(phase="checkpoint")
        done = self.next_step
        last = self.plan.step(done - 1)
        meta = {
            "step": done,
            "position": self._position(done),
            "tokens": last.tokens_before + last.batch * last.seq_len,
            "engine": self.engine.extra_state(),
            "spikes": self.spikes.state(),
            "experts": self.experts.state(),
            "loss": self.loss,
        }
        self.checkpointer.save(done, self.engine.state(), meta)

    # --- talking --------------------------------------------------------------------------------------------------------------------

    def _write(self, step: int, values: dict) -> None:
        if self.mesh.rank:
            return
        for sink in self.sinks:
            try:
                sink.write(step, values)
            except OSError as error:  # a full disk must not end the run: what trains is in memory
                if not self.metrics_lost:
                    self.console.message(f"metrics cannot be written: {error}; training goes on, this is said once")
                self.metrics_lost = True

    def _say(self, text: str) -> None:
        if self.mesh.rank == 0:
            self.console.message(text)

    def _event(self, step: Step, text: str) -> None:
        self._write(step.index + 1, {"kind": "event", "text": text})
        self._say(text)


def _blame(problem: str, step: Step, result: StepResult) -> str:
    """The fault, and the samples that it came from as far as the losses tell."""
    if result.bad_samples:
        return f"step {step.index + 1}: {problem}, from samples {', '.join(map(str, result.bad_samples))}"
    last = step.first_sample + step.batch - 1
    return f"step {step.index + 1}: {problem}; every loss is finite, the step's samples are {step.first_sample} to {last}"
