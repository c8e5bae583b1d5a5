"""Jobs done by processes of their own, so that one that crashes or hangs costs itself alone.

A list of jobs goes to a world of ranks, which leaves one result file per job. When the world ends early, the job it was at has failed, its
last words are kept, and another world takes the rest.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from llmtrain.errors import UserError

POLL, PATIENCE, END_PATIENCE = 0.2, 300.0, 20.0
"""Seconds between looks; without a result before a world counts as hung; and for a world to end after its last result or SIGTERM."""


@dataclass(frozen=True)
class Job:
    """One piece of work: `kind` names a function of `llmtrain.tools.selftest.rank`, `arguments` are its keyword arguments."""

    name: str
    kind: str
    arguments: dict = field(default_factory=dict)


@dataclass
class Result:
    """What a job gave: JSON-able `values` and arrays in the file `arrays`; or `error`, the last words of its world."""

    values: dict | None = None
    arrays: Path | None = None
    error: str | None = None


def run(
    jobs: list[Job], *, ranks: int, device: str, folder: Path, plugins: list[str], done: Callable[[Job, Result], None]
) -> dict[str, Result]:
    """Every job's result by name; `done` is called as each one ends. ranks: processes; device: cpu, cuda or npu."""
    results: dict[str, Result] = {}
    left = list(jobs)
    while left:
        place = Path(tempfile.mkdtemp(dir=folder))
        world = _World(left, ranks=ranks, device=device, plugins=plugins, place=place)
        try:
            for job in left:
                result = world.wait(job)
                results[job.name] = result
                done(job, result)
                if result.error is not None:
                    break
        finally:  # also where this process is interrupted
            world.end()
        left = [job for job in left if job.name not in results]
    return results


class _World:
    """One set of processes, started by `llmtrain.tools.selftest.rank`."""

    def __init__(self, jobs: list[Job], *, ranks: int, device: str, plugins: list[str], place: Path):
        self.place, self.jobs = place, jobs
        told = {"ranks": ranks, "device": device, "plugins": plugins, "jobs": [vars(job) for job in jobs]}
        (place / "jobs.json").write_text(json.dumps(told))
        env = {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")}
        with open(place / "output.txt", "wb") as output:
            command = [sys.executable, "-m", "llmtrain.tools.selftest.rank", str(place / "jobs.json")]
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=env, start_new_session=True
            )

    def wait(self, job: Job) -> Result:
        """The result of `job`, the next one in the list."""
        index, deadline = self.jobs.index(job), time.monotonic() + PATIENCE
        values, arrays = self.place / f"{index}.json", self.place / f"{index}.npz"
        while True:
            ended = self.process.poll() is not None  # before the look: nothing comes after the end
            if values.exists():
                return Result(json.loads(values.read_text()), arrays if arrays.exists() else None)
            if ended:
                return Result(error=self._last_words())
            if time.monotonic() > deadline:
                return Result(error=f"no result within {PATIENCE:g} s: {self._last_words()}")
            time.sleep(POLL)

    def end(self) -> None:
        """Wait for the processes; ask them, then make them end if they do not."""
        try:
            self.process.wait(0 if self._unfinished() else END_PATIENCE)
        except subprocess.TimeoutExpired:
            self._end_by(signal.SIGTERM)

    def _end_by(self, signum: int) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signum)
        try:
            self.process.wait(END_PATIENCE)
        except subprocess.TimeoutExpired:
            self._end_by(signal.SIGKILL)

    def _unfinished(self) -> bool:
        return not (self.place / f"{len(self.jobs) - 1}.json").exists()

    def _last_words(self) -> str:
        """The last line of the output that names an error, or the last line at all."""
        lines = (self.place / "output.txt").read_text(errors="replace").splitlines()
        lines = [line.strip() for line in lines if line.strip()]
        errors = [line for line in lines if "Error" in line and "ChildFailedError" not in line]
        return (errors or lines or ["its process ended without a word"])[-1][:500]


def check_ranks(ranks: int, device: str, available: int) -> None:
    """Refuse ranks for which there are no devices."""
    if ranks < 1:
        raise UserError(f"--ranks {ranks}: at least 1")
    if device != "cpu" and ranks > available:
        raise UserError(f"--ranks {ranks}: this machine has {available} {device} devices; ask for at most that many")
