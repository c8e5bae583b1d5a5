"""Notices a rank that waits in a collective for too long, has every rank say where it is, and ends the run with one report.

A thread in every rank looks at what `inside.py` finds. Ranks of one machine meet in a folder (`board.py`), machines in the store that the
ranks joined the world through (`machines.py`).
"""

import os
import re
import secrets
import signal
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from llmtrain.compat import limit_collectives
from llmtrain.parallel.cores import machine
from llmtrain.parallel.hang import report as words
from llmtrain.parallel.hang.board import VARIABLE, Board, write_atomic
from llmtrain.parallel.hang.inside import Inside, all_stacks, failed_in_collective, frames_of
from llmtrain.parallel.hang.machines import Far
from llmtrain.parallel.hang.record import DEVICE, Field
from llmtrain.parallel.hang.settle import begun_by
from llmtrain.parallel.hang.where import HERE, set_labels
from llmtrain.parallel.mesh import MARGIN, Mesh

GUARD = 3  # exit code
TICK = 0.5  # seconds between looks
NOTICE = 2.0  # seconds without progress after which the main thread's frames are looked at
ANSWER = 1.5  # seconds that the ranks of a machine get to say where they are
FOLLOW = 6.0  # seconds that they wait for the report


@contextmanager
def watching(mesh: Mesh, *, timeout: float, path: Path | None, report: bool = True) -> Iterator[None]:
    """Watch this rank while the block runs; all ranks enter together. The report goes to stderr of rank 0 and, with all stacks, to `path`.

    A collective that fails in the block, as when another rank is gone, ends the process with the same report. Without `report` the back
    end's own error, MARGIN seconds after `timeout`, is all there is.
    """
    limit_collectives(timeout + MARGIN)
    if mesh.world == 1 or not report:
        yield
        return
    watch = Watch(mesh, timeout=timeout, path=path)
    try:
        yield
    except BaseException as error:
        if failed_in_collective(error):
            watch.report(error)
        watch.close(error)
        raise
    watch.close()


class Watch:
    """The watcher of one rank; `timeout` in seconds, `path` of the report with all stacks, None for no file."""

    def __init__(self, mesh: Mesh, *, timeout: float, path: Path | None):
        self.rank, self.world, self.timeout, self.path = mesh.rank, mesh.world, timeout, path
        self.inside = Inside(mesh)
        set_labels({name: axis for name, (axis, _) in self.inside.groups.items()})
        token, machines = _meet(mesh)
        self.mates = next(ranks for ranks in machines if self.rank in ranks)
        self.far = Far(len(machines), machines.index(self.mates))
        folder = os.environ.get(VARIABLE)
        self.board = Board(Path(folder) if folder else Path(tempfile.gettempdir()) / f"llmtrain-{token}", self.rank)
        HERE.attach(self.board.join())
        HERE.slots[Field.PID] = os.getpid()
        self._reporting, self._over = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="hang watcher", daemon=True)
        self._thread.start()

    def close(self, error: BaseException | None = None) -> None:
        """Stop watching. An error stays known to the other ranks, which may wait for this one in vain."""
        self._over.set()
        self._thread.join()
        if error is not None:
            said = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            frames, at = frames_of(error)
            self.board.put({**self._here(), "state": words.RAISED, "error": said, "frames": frames, "at": at})
        HERE.detach()
        self.board.leave(keep=error is not None)

    # --- noticing ------------------------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        tick = min(TICK, self.timeout / 8)
        marks, since = -1, time.monotonic()
        while not self._over.wait(tick):
            if HERE.slots[Field.MARKS] != marks:
                marks, since = HERE.slots[Field.MARKS], time.monotonic()
            quiet = time.monotonic() - since
            if quiet >= min(NOTICE, self.timeout / 8):
                self.inside.notice()
            # Only a rank that makes no progress asks further.
            stuck = quiet >= self.timeout / 2 and (self._waited(quiet) >= self.timeout or self.far.called())
            if stuck or self.board.called():
                self.report()

    def _waited(self, quiet: float) -> float:
        """Seconds that this rank has waited in a collective so far, without a mark in between."""
        found = self.inside.collective()
        return min(quiet, found["seconds"]) if found else 0.0

    # --- reporting -----------------------------------------------------------------------------------------------------------------

    def report(self, error: BaseException | None = None) -> None:
        """Say where this rank is, wait for the report of all, show it, end the process. Only the first caller comes through."""
        self._reporting.acquire()
        try:
            first = self.board.call()
            self.board.put(self._mine(error))
            self.far.call()
            if first:
                self._lead()
            else:
                self._follow()
            self.board.clear(last=first)
        except Exception:  # whatever fails here, the process must end
            os.write(2, traceback.format_exc().encode())
        os._exit(GUARD)

    def _mine(self, error: BaseException | None) -> dict:
        found = self.inside.collective() if error is None else self.inside.failed(error)
        report = {**self._here(), **(found or {}), "state": words.WAITS if found else words.RUNS, "stack": all_stacks()}
        if report["op"] == DEVICE:
            report |= {"begun": begun_by(HERE), "groups": self.inside.axes()}
        report["frames"], report["at"] = self.inside.frames() if error is None else frames_of(error)
        if error is not None:
            report |= {"state": words.FAILED, "error": _first_sentence(error)}
            report |= {"op": report["op"] or "a collective", "group": report["group"] or "world"}
        return report

    def _here(self) -> dict:
        return {"rank": self.rank, **HERE.read()}

    def _lead(self) -> None:
        """Report for this machine."""
        mine = self._collect()
        silent = [rank for rank in self.mates if mine[rank]["state"] not in (*words.ANSWERED, "ended", "left the run")]
        reports = self.far.exchange(mine)
        reports |= {rank: {"rank": rank, "state": words.SILENT} for rank in range(self.world) if rank not in reports}
        text = words.render(reports, timeout=self.timeout)
        leading = 0 in self.mates or reports[0]["state"] == words.SILENT
        if leading and self.path is not None:
            self._write(words.render(reports, timeout=self.timeout, full=True))
        self.board.finish(text, ending=silent)
        console_answers = 0 in self.mates and mine[0]["state"] in words.ANSWERED  # else the launcher shows it, or this rank
        if self.rank == 0 or (leading and not console_answers and VARIABLE not in os.environ):
            self._show(text)
        for rank in silent:
            self._kill(rank)

    def _collect(self) -> dict[int, dict]:
        """What the ranks of this machine say, and what is found out about those that do not answer."""
        end = time.monotonic() + ANSWER
        while time.monotonic() < end and len(self.board.reports()) < len(self.mates):
            time.sleep(0.05)
        said = self.board.reports()
        return {rank: said.get(rank) or self.board.probe(rank) for rank in self.mates}

    def _follow(self) -> None:
        end = time.monotonic() + FOLLOW
        while (done := self.board.finished()) is None and time.monotonic() < end:
            time.sleep(0.05)
        if self.rank == 0:
            self._show(done["text"] if done else words.render(self.board.reports(), timeout=self.timeout))

    def _write(self, text: str) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(self.path, f"{words.stamp()}\n{text}")
        except OSError as error:
            os.write(2, f"hang: the report cannot be written: {error}\n".encode())

    def _show(self, text: str) -> None:
        file = "" if self.path is None else f"\nstacks of all threads: {self.path}\n"
        os.write(2, f"\n{text}{file}".encode())

    def _kill(self, rank: int) -> None:
        """End a rank of this machine that cannot end itself."""
        with suppress(ProcessLookupError):
            os.kill(self.board.place(rank)["pid"], signal.SIGKILL)


def _first_sentence(error: BaseException) -> str:
    """What a back end says, without the place in its own source before and the advice after."""
    return re.sub(r"^\[\S*?\] ", "", str(error)).partition(". ")[0][:200]


def _meet(mesh: Mesh) -> tuple[str, list[list[int]]]:
    """A name for this run that nobody can guess, and the ranks of each machine. Ranks of two launchers count as two machines."""
    said = mesh.gather((secrets.token_hex(16), machine(), os.environ.get(VARIABLE)))
    machines: dict[tuple, list[int]] = {}
    for rank, (_, *place) in enumerate(said):
        machines.setdefault(tuple(place), []).append(rank)
    return said[0][0], list(machines.values())
