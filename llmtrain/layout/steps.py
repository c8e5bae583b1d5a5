"""What each optimizer step of a run consists of: phase, batch, data position, learning rate. Plain arithmetic on the configuration."""

import math
from bisect import bisect_right
from dataclasses import dataclass

from llmtrain.config.run import RunConfig
from llmtrain.config.train import BatchRamp, PhaseConfig, ScheduleConfig
from llmtrain.errors import UserError


@dataclass(frozen=True)
class Phase:
    """A resolved phase: lengths in samples (sequences of seq_len tokens), nothing left to default."""

    index: int
    name: str
    seq_len: int
    micro_batch: int
    rope_base: float
    schedule: ScheduleConfig
    peak_lr: float
    mix: dict[str, float] | None
    first_step: int
    steps: int
    first_sample: int
    samples: int
    tokens_before: int

    @property
    def tokens(self) -> int:
        """Tokens of the phase."""
        return self.samples * self.seq_len


@dataclass(frozen=True)
class Segment:
    """Consecutive steps of one phase with one batch size."""

    phase: Phase
    first_step: int
    steps: int
    batch: int
    first_sample: int


@dataclass(frozen=True)
class Step:
    """One optimizer step. `first_sample` is the run's data position: samples consumed before it, over all phases."""

    index: int
    phase: Phase
    seq_len: int
    batch: int
    micro_batch: int
    first_sample: int
    tokens_before: int
    lr: float
    rope_base: float


def learning_rate(schedule: ScheduleConfig, *, peak: float, step: int, progress: float) -> float:
    """Learning rate at `step` of a phase, `progress` being the share of its tokens behind, from warm-up's end (0) to the end (1)."""
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    final = peak / 10 if schedule.final_lr is None else schedule.final_lr
    if schedule.kind == "cosine":
        return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * progress))
    if schedule.kind == "wsd":
        return peak + (final - peak) * max(0.0, (progress - 1 + schedule.decay_fraction) / schedule.decay_fraction)
    return peak


def _ramp(phase: PhaseConfig, default: int) -> list[BatchRamp]:
    if isinstance(phase.batch, list):
        ramp = sorted(phase.batch, key=lambda entry: entry.from_tokens)
        if not ramp or ramp[0].from_tokens != 0:
            raise UserError("a batch ramp must start with from_tokens: 0 (train.phases.N.batch)")
        return ramp
    return [BatchRamp(from_tokens=0, size=phase.batch or default)]


def _sizes(phase: PhaseConfig, *, seq_len: int, default_batch: int) -> list[tuple[int, int]]:
    """(batch, steps) of each ramp entry of a phase, in order."""
    ramp, sizes, tokens, steps = _ramp(phase, default_batch), [], 0, 0
    for entry, following in zip(ramp, [*ramp[1:], None]):
        per_step = entry.size * seq_len
        ends = [] if following is None else [following.from_tokens]
        ends += [] if phase.tokens is None else [phase.tokens]
        count = max(0, math.ceil((min(ends) - tokens) / per_step)) if ends else phase.steps - steps
        count = count if phase.steps is None else min(count, phase.steps - steps)
        if count:
            sizes.append((entry.size, count))
        tokens, steps = tokens + count * per_step, steps + count
    return sizes


class StepPlan:
    """Every step of a run. Built from the configuration alone, so all ranks, meshes and resumed runs agree."""

    def __init__(self, segments: list[Segment]):
        self.segments = segments
        self.phases = list({segment.phase.index: segment.phase for segment in segments}.values())
        self._starts = [segment.first_step for segment in segments]

    @classmethod
    def from_config(cls, cfg: RunConfig) -> "StepPlan":
        """Resolve the phases of `cfg`; a run without phases is one phase. Raises UserError if the run has no length."""
        train, configs = cfg.train, cfg.train.phases
        if not configs:
            if train.epochs is not None:
                raise UserError("train.epochs needs the data to become steps, which only a run has; set train.steps")
            if train.steps is None and train.tokens is None:
                raise UserError("the run has no length: set train.steps, train.tokens, train.epochs or train.phases")
            configs = [PhaseConfig(steps=train.steps, tokens=train.tokens)]
        segments: list[Segment] = []
        step = sample = tokens = 0
        for index, config in enumerate(configs):
            seq_len = config.seq_len or train.seq_len
            sizes = _sizes(config, seq_len=seq_len, default_batch=train.global_batch)
            schedule = config.schedule or cfg.schedule
            phase = Phase(
                index=index,
                name=config.name or f"phase-{index}",
                seq_len=seq_len,
                micro_batch=config.micro_batch or train.micro_batch,
                rope_base=config.rope_base or cfg.model.position.base,
                schedule=schedule,
                peak_lr=schedule.lr or cfg.optim.lr,
                mix=config.mix,
                first_step=step,
                steps=sum(count for _, count in sizes),
                first_sample=sample,
                samples=sum(batch * count for batch, count in sizes),
                tokens_before=tokens,
            )
            for batch, count in sizes:
                segments.append(Segment(phase, step, count, batch, sample))
                step, sample = step + count, sample + batch * count
            tokens += phase.tokens
        return cls(segments)

    @property
    def steps(self) -> int:
        """Optimizer steps of the run."""
        last = self.segments[-1]
        return last.first_step + last.steps

    @property
    def tokens(self) -> int:
        """Tokens of the run."""
        return sum(phase.tokens for phase in self.phases)

    def step(self, index: int) -> Step:
        """Step `index`, counted from 0."""
        if not 0 <= index < self.steps:
            raise IndexError(f"step {index} of a run of {self.steps} steps")
        segment = self.segments[bisect_right(self._starts, index) - 1]
        phase = segment.phase
        sample = segment.first_sample + (index - segment.first_step) * segment.batch
        behind = (sample - phase.first_sample) * phase.seq_len
        warm = self._tokens_of_warmup(phase)
        progress = min(1.0, max(0.0, (behind - warm) / max(1, phase.tokens - warm)))
        lr = learning_rate(phase.schedule, peak=phase.peak_lr, step=index - phase.first_step, progress=progress)
        return Step(
            index=index,
            phase=phase,
            seq_len=phase.seq_len,
            batch=segment.batch,
            micro_batch=phase.micro_batch,
            first_sample=sample,
            tokens_before=phase.tokens_before + behind,
            lr=lr,
            rope_base=phase.rope_base,
        )

    def _tokens_of_warmup(self, phase: Phase) -> int:
        tokens = 0
        for segment in self.segments:
            if segment.phase is phase:
                done = segment.first_step - phase.first_step
                tokens += max(0, min(segment.steps, phase.schedule.warmup_steps - done)) * segment.batch * phase.seq_len
        return tokens

    def check_batches(self, *, dp: int) -> None:
        """Every batch must split evenly over `dp` ranks and micro-batches; raises UserError that shows the arithmetic."""
        for segment in self.segments:
            per_pass = dp * segment.phase.micro_batch
            if segment.batch % per_pass:
                raise UserError(
                    f"{segment.phase.name}: a batch of {segment.batch} sequences does not split over {dp} data-parallel ranks x "
                    f"micro-batches of {segment.phase.micro_batch} = {per_pass}; change train.global_batch or train.micro_batch"
                )
