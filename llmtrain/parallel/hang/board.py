"""A folder in which the ranks of one machine see each other, also those that are stopped or gone. Imports no torch.

rank-N.where is the record of a rank (`parallel/hang/record.py`) in shared memory, rank-N.stack what its Python threads do, written when
SIGURG asks for it, rank-N.json what a rank says of itself once a hang was called. `call` is made by the first to see a hang, which
then reports for the machine; `report.json` ends it.
"""

import faulthandler
import json
import mmap
import os
import shutil
import signal
import time
from pathlib import Path

from llmtrain.parallel.hang.record import SIZE, decode

VARIABLE = "LLMTRAIN_BOARD"
"""Environment variable in which the launcher gives its ranks the folder."""
REPORT = "report.json"
# Ignored by a process that does not expect it, unlike SIGUSR1 and SIGUSR2, which schedulers also use for warnings of their own.
ASK = signal.SIGURG
STACK_PATIENCE = 0.5  # seconds that a rank gets to write its stack


class Board:
    """The folder as rank `rank` uses it."""

    def __init__(self, folder: Path, rank: int):
        self.folder, self.rank = folder, rank
        self._memory: mmap.mmap | None = None
        self._stack = None

    def join(self) -> memoryview:
        """Make this rank visible; returns the shared memory for its record."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with open(self._path("where"), "w+b") as file:
            file.truncate(SIZE)
            self._memory = mmap.mmap(file.fileno(), SIZE)
        # The handler is written in C: it answers also while a library holds the interpreter's lock.
        self._stack = open(self._path("stack"), "w", encoding="utf-8")  # noqa: SIM115 (open as long as the handler is)
        faulthandler.register(ASK, file=self._stack, all_threads=True)
        return memoryview(self._memory)

    def leave(self, *, keep: bool = False) -> None:
        """Become invisible, or with `keep` leave for the others what is known of this rank. The record must be detached."""
        faulthandler.unregister(ASK)
        self._stack.close()
        self._memory.close()
        if keep:
            return
        for suffix in ("where", "stack", "json"):
            self._path(suffix).unlink(missing_ok=True)
        if not any(self.folder.iterdir()) and VARIABLE not in os.environ:
            shutil.rmtree(self.folder, ignore_errors=True)

    def call(self) -> bool:
        """Say that the run hangs; True on the first rank of the machine that does."""
        try:
            os.close(os.open(self.folder / "call", os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            return False
        return True

    def called(self) -> bool:
        """Whether a rank of the machine has said so."""
        return os.path.exists(self.folder / "call")

    def put(self, report: dict) -> None:
        """Say what this rank does."""
        write_atomic(self._path("json"), json.dumps(report))

    def reports(self) -> dict[int, dict]:
        """What the ranks of the machine said, by rank."""
        return {report["rank"]: report for path in self.folder.glob("rank-*.json") if (report := read_json(path))}

    def probe(self, rank: int) -> dict:
        """What can be found out about a rank of this machine that does not answer: its last place, its state, its stack."""
        try:
            place = self.place(rank)
        except FileNotFoundError:
            return {"rank": rank, "state": "left the run"}
        report = {"rank": rank, **place, "state": state_of(place["pid"])}
        if report["state"] == "does not answer":
            report["stack"] = self._ask_for_stack(rank, place["pid"])
        return report

    def place(self, rank: int) -> dict:
        """The record of a rank of this machine."""
        return decode(self._path("where", rank).read_bytes())

    def _ask_for_stack(self, rank: int, pid: int) -> str:
        path = self._path("stack", rank)
        os.kill(pid, ASK)
        end, size = time.monotonic() + STACK_PATIENCE, -1
        while time.monotonic() < end and not (size > 0 and size == path.stat().st_size):
            size = path.stat().st_size
            time.sleep(0.05)
        return path.read_text(encoding="utf-8", errors="replace")

    def finish(self, text: str, *, ending: list[int]) -> None:
        """End the hang with its report; `ending` are the ranks that do not answer and will be killed."""
        write_atomic(self.folder / REPORT, json.dumps({"text": text, "ending": ending}))

    def finished(self) -> dict | None:
        """What `finish` wrote."""
        return read_json(self.folder / REPORT)

    def clear(self, *, last: bool) -> None:
        """Remove what a hang leaves, where the launcher does not; the `last` rank waits for the others and removes the folder."""
        if VARIABLE in os.environ:
            return
        self._path("where").unlink(missing_ok=True)
        end = time.monotonic() + 1.0
        while last and any(self.folder.glob("*.where")) and time.monotonic() < end:
            time.sleep(0.05)
        if last:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, suffix: str, rank: int | None = None) -> Path:
        return self.folder / f"rank-{self.rank if rank is None else rank}.{suffix}"


def state_of(pid: int) -> str:
    """`ended`, `stopped by a signal` (SIGSTOP, a debugger), or `does not answer`."""
    import psutil  # here, as the launcher has to start at once and needs it in no other case

    try:
        status = psutil.Process(pid).status()
    except psutil.NoSuchProcess:
        return "ended"
    if status in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
        return "ended"
    return "stopped by a signal" if status in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP) else "does not answer"


def write_atomic(path: Path, text: str) -> None:
    """Write a file that others see whole or not at all."""
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    fresh.write_text(text, encoding="utf-8")
    fresh.replace(path)


def read_json(path: Path) -> dict | None:
    """The file's content; None if there is no such file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
