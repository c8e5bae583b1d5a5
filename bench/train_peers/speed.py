"""Interleaved rounds of one class (a number format, eager or compiled): who takes how long."""

import statistics
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field

from train_peers.pool import Process, WorkerError
from train_peers.shape import Shape


@dataclass
class Timing:
    """What one contender took. `rounds` holds seconds per step of each round."""

    name: str
    first: float = 0.0
    rounds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    faults: float = 0.0
    idle: float = 0.0

    @property
    def median(self) -> float:
        """Seconds per step."""
        return statistics.median(self.rounds)


@dataclass
class Class:
    """The result of one class: timings by name, the GEMM rate of each round in GFLOP/s, and what failed."""

    dtype: str
    mode: str
    timings: dict[str, Timing]
    gemm: list[float]
    failed: dict[str, str]


def measure(names: list[str], shape: Shape, *, dtype: str, mode: str, options) -> Class:
    """Run the class. `options` has rounds, steps, warmup, threads, overrides and compile_cache.

    A contender that fails is reported, not timed.
    """
    with ExitStack() as stack:
        probe = stack.enter_context(Process("gemm", threads=options.threads))
        workers: dict[str, Process] = {}
        done = Class(dtype, mode, {}, [], {})
        for name in names:
            worker = stack.enter_context(Process(name, threads=options.threads, compile_cache=options.compile_cache))
            try:
                done.timings[name] = _start(worker, shape, dtype=dtype, mode=mode, options=options)
                workers[name] = worker
            except WorkerError as error:
                done.failed[name] = error.reason
                print(f"  FAILED {error}", flush=True)
        _rounds(workers, probe, done, options)
    return done


def _start(worker: Process, shape: Shape, *, dtype: str, mode: str, options) -> Timing:
    worker.ask("build", name=worker.name, shape=asdict(shape), dtype=dtype, compiled=mode == "compile", overrides=options.overrides)
    first = worker.ask("steps", count=1)
    warm = worker.ask("steps", count=options.warmup)
    print(
        f"  {worker.name}: first step {first['seconds'][0]:.1f} s, {options.warmup} more to warm up: {warm['seconds'][-1]:.2f} s",
        flush=True,
    )
    return Timing(worker.name, first=first["seconds"][0], losses=first["losses"] + warm["losses"])


def _rounds(workers: dict[str, Process], probe: Process, done: Class, options) -> None:
    names = list(workers)
    started = time.perf_counter()
    before = {name: workers[name].cpu_seconds() for name in names}
    for index in range(options.rounds):
        turn = index % max(1, len(names))
        for name in names[turn:] + names[:turn]:
            timing = done.timings[name]
            # What a contender uses of the CPU between its rounds would be taken from the others.
            timing.idle += workers[name].cpu_seconds() - before[name]
            answer = workers[name].ask("steps", count=options.steps)
            timing.rounds.append(sum(answer["seconds"]) / options.steps)
            timing.losses += answer["losses"]
            timing.faults = answer["faults"] / options.steps
            before[name] = workers[name].cpu_seconds()
        done.gemm.append(probe.ask("gemm")[done.dtype])
        spent = time.perf_counter() - started
        left = spent / (index + 1) * (options.rounds - index - 1)
        steps = ", ".join(f"{name} {done.timings[name].rounds[-1]:.2f}" for name in names)
        print(
            f"  round {index + 1}/{options.rounds}: {steps} s; GEMM {done.gemm[-1]:.0f} GFLOP/s; {left:.0f} s left in this class",
            flush=True,
        )
