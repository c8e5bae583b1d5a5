"""When a run has to stop before its end: signals and deadlines."""

import os
import shutil
import signal
import subprocess
import time
from datetime import datetime
from pathlib import Path

from llmtrain.config.train import GuardsConfig
from llmtrain.errors import UserError

ABORTED = 130  # exit code of a second Ctrl-C, as shells report SIGINT


class StopRequest:
    """Context in which SIGINT, SIGTERM and SIGHUP ask the run to stop after the current step, and the deadline is watched.

    The loop asks `should_stop()` on every rank after every step and stops if any rank says so. A SIGINT after a stop was asked for
    ends the process at once (exit code 130) and says what is saved; set `folder` to the run folder for that message. A signal that was
    ignored before stays ignored. The handlers found are put back on leaving. Raises UserError on entering for a bad deadline.
    """

    def __init__(self, cfg: GuardsConfig, *, folder: Path | None = None):
        self.cfg, self.folder = cfg, folder
        self.signal: int | None = None
        """The first signal received."""
        self.deadline: float | None = None
        """When to stop, in seconds since 1970."""
        self._old: dict[int, object] = {}

    def __enter__(self) -> "StopRequest":
        self.deadline = deadline_of(self.cfg.deadline)
        if self.deadline is not None and self.deadline <= time.time():
            raise UserError(f"guards.deadline {self.cfg.deadline} ({_clock(self.deadline)}) is in the past; move it or leave it out")
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(signum) is not signal.SIG_IGN:
                self._old[signum] = signal.signal(signum, self._on_signal)
        return self

    def __exit__(self, *exception) -> None:
        for signum, handler in self._old.items():
            signal.signal(signum, handler)
        self._old.clear()

    def should_stop(self, now: float | None = None) -> str | None:
        """Why this rank wants to stop, or None. `now` is in seconds since 1970."""
        if self.signal is not None:
            return signal.Signals(self.signal).name
        now = time.time() if now is None else now
        if self.deadline is not None and now >= self.deadline - self.cfg.deadline_margin:
            return f"the deadline {_clock(self.deadline)} (guards.deadline_margin {self.cfg.deadline_margin:g} s)"
        return None

    def _on_signal(self, signum: int, frame) -> None:
        if self.signal is None:
            self.signal = signum
            _say(f"{signal.Signals(signum).name}: stopping after this step, then saving; Ctrl-C now stops at once")
        elif signum == signal.SIGINT:
            _say(f"stopped at once: {self._saved()}; the steps since are lost")
            os._exit(ABORTED)

    def _saved(self) -> str:
        latest = self.folder / "latest" if self.folder else None
        if latest is not None and not latest.is_symlink():
            return f"no checkpoint is complete in {self.folder}"
        return f"saved is {os.path.realpath(latest)}" if latest else "saved is the newest complete checkpoint of the run folder"


def deadline_of(text: str | None) -> float | None:
    """`guards.deadline` as seconds since 1970: an ISO time (local, unless it has an offset), or `slurm` for the end of the job.

    Where SLURM_JOB_END_TIME is not set, Slurm is asked by rank 0 alone, since one rank is enough to stop a run. Raises UserError.
    """
    if text is None:
        return None
    if text == "slurm":
        return _slurm_end()
    try:
        return datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp()
    except ValueError:
        raise UserError(f"guards.deadline {text!r} is no ISO time like 2026-01-31T18:00:00 (local) or ...+01:00, and not `slurm`") from None


def _slurm_end() -> float | None:
    if end := os.environ.get("SLURM_JOB_END_TIME"):
        return float(end)
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        raise UserError("guards.deadline is slurm, but this is no Slurm job (SLURM_JOB_ID is not set); give an ISO time or leave it out")
    if int(os.environ.get("RANK", 0)) != 0:
        return None
    return _ask_slurm(job)


def _ask_slurm(job: str) -> float:
    hint = "give guards.deadline as an ISO time"
    if shutil.which("squeue") is None:
        raise UserError(f"guards.deadline is slurm, but SLURM_JOB_END_TIME is not set and squeue is not on the PATH; {hint}")
    try:
        answer = subprocess.run(["squeue", "-h", "-j", job, "-o", "%e"], capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired:
        raise UserError(f"guards.deadline is slurm, but squeue did not answer within 60 s; {hint}") from None
    end = answer.stdout.strip()
    if answer.returncode:
        raise UserError(f"guards.deadline is slurm, but squeue failed for job {job}: {answer.stderr.strip()}; {hint}")
    try:
        return datetime.fromisoformat(end).timestamp()
    except ValueError:
        raise UserError(f"guards.deadline is slurm, but squeue knows no end of job {job} (it says {end!r}); {hint}") from None


def _clock(moment: float) -> str:
    return datetime.fromtimestamp(moment).astimezone().isoformat(timespec="seconds")


def _say(text: str) -> None:
    if int(os.environ.get("RANK", 0)) == 0:
        os.write(2, f"\n{text}\n".encode())  # a handler may interrupt a buffered write, which must not be entered again
