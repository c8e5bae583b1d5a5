"""Start the ranks of one machine and see them through to their end. Imports no torch, so that it starts at once."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from llmtrain.hardware import cores, messages
from llmtrain.parallel.hang import board
from llmtrain.tools.slurm import adopt_rank

STOPPED, GUARD = 2, 3  # exit codes of ranks that end by their own decision
KILLED = 128 + signal.SIGKILL
POLL = 0.05  # seconds between looks at the ranks
FAIL_PATIENCE = 1.0  # seconds the other ranks get to fail by themselves, as they do after a user's error
KILL_PATIENCE = 5.0  # seconds between SIGTERM and SIGKILL once a rank has failed
HANG_PATIENCE = 2.0  # seconds that ranks get to end by themselves once the report of a hang is there
TAIL_LINES = 25

# Runs in the child before the target. A process group of its own keeps the terminal's Ctrl-C away (the parent forwards it once, as
# SIGTERM), and lets the parent reach what the rank started. Linux then kills the rank when its parent dies (PR_SET_PDEATHSIG is 1);
# the setting survives exec. A parent that died before it was made shows as a changed parent.
_START = """
import ctypes, os, signal, sys
parent, *command = sys.argv[1:]
os.setpgid(0, 0)
if sys.platform == "linux" and ctypes.CDLL(None).prctl(1, signal.SIGKILL):
    sys.stderr.write("launch: the kernel refused PR_SET_PDEATHSIG; ranks may outlive a killed launcher\\n")
if os.getppid() != int(parent):
    os._exit(1)
os.execvp(command[0], command)
"""


def is_launched() -> bool:
    """Whether this process already is a rank: `RANK` is set (torchrun, run_local), or it is one of several tasks of `srun`.

    Under `srun` the variables that torch.distributed reads are set from Slurm's own.
    """
    return "RANK" in os.environ or adopt_rank(os.environ)


def run_local(
    argv: Sequence[str],
    ranks: int,
    *,
    threads: int | None = None,
    grace: float = 60.0,
    logs: Path | None = None,
    command: Sequence[str] | None = None,
) -> int:
    """Run `python -m llmtrain ARGV` as `ranks` processes on this machine; return the exit code of the run.

    argv: arguments of every rank. ranks: how many. threads: OMP_NUM_THREADS of a rank, by default its share of the cores, unless the
    environment has it. grace: seconds that ranks get to save after SIGINT, SIGTERM or SIGHUP (forwarded once, as SIGTERM) before they
    are killed; a second Ctrl-C is forwarded as SIGINT and ends them within seconds. logs: folder for the output of ranks 1 and up,
    `rank-N.txt` (appended to); without it that output is dropped, and its tail is shown when such a rank fails. command: what to run in
    place of `python -m llmtrain`.

    Rank 0 writes to this process's stdout and stderr. When a rank fails the others get SIGTERM, then SIGKILL, and its exit code is
    returned (128 + signal if a signal ended it). No rank outlives this process, not even by SIGKILL (Linux). Main thread only.
    """
    if ranks < 1:
        raise ValueError(f"ranks is {ranks}; it must be at least 1")
    target = [*(command or (sys.executable, "-m", "llmtrain")), *argv]
    with (
        _log_folder(logs) as folder,
        tempfile.TemporaryDirectory(prefix="llmtrain-") as meeting,
        reserved_port() as port,
        _requests() as requests,
    ):
        group = _Group(folder, Path(meeting))
        try:
            for rank in range(ranks):
                group.start(target, _rank_env(rank, ranks, port=port, threads=threads) | {board.VARIABLE: meeting})
            return _supervise(group, requests, grace)
        finally:
            group.kill()


def _rank_env(rank: int, ranks: int, *, port: int, threads: int | None) -> dict[str, str]:
    env = dict(os.environ)
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
    env["MASTER_ADDR"] = "127.0.0.1"
    env.update({name: str(value) for name, value in places.items()})
    if threads is not None:
        env["OMP_NUM_THREADS"] = str(threads)
    elif "OMP_NUM_THREADS" not in env:
        # Before torch and numpy make their pools; the rank itself binds its cores and counts again (parallel/cores.py).
        env["OMP_NUM_THREADS"] = env[cores.OURS] = str(cores.place(ranks, rank, cores=_machine(), quota=cores.cpu_quota()).threads)
    return env


@cache
def _machine() -> list[cores.Core]:
    return cores.read_cores(cores.allowed_cpus())


class _Group:
    """The processes of one run, in rank order, and the order in which they failed."""

    def __init__(self, folder: Path, meeting: Path):
        self.folder, self.meeting = folder, meeting
        self.hang: dict | None = None
        """The report of a hang, once the ranks have made it (`parallel/hang/board.py`)."""
        self.processes: list[subprocess.Popen] = []
        self.log_starts: list[int] = []
        self.failed: list[int] = []
        self.killed = False

    def start(self, target: list[str], env: dict[str, str]) -> None:
        rank = len(self.processes)
        full = [sys.executable, "-I", "-S", "-c", _START, str(os.getpid()), *target]
        if rank == 0:
            self.processes.append(subprocess.Popen(full, env=env, stdin=subprocess.DEVNULL))
            self.log_starts.append(0)
            return
        with open(self._log(rank), "ab") as log:
            self.log_starts.append(log.tell())
            self.processes.append(subprocess.Popen(full, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT))

    def running(self) -> bool:
        """Look at every rank, note the ones that failed since, and say whether any still runs."""
        codes = [process.poll() for process in self.processes]
        new = [rank for rank, code in enumerate(codes) if code and rank not in self.failed]
        # Of ranks that failed between two looks, one ended by a signal or with a traceback is the likelier cause.
        self.failed += sorted(new, key=lambda rank: (codes[rank] > 0, not self.has_traceback(rank)))
        if new and self.hang is None:
            self.hang = board.read_json(self.meeting / board.REPORT)
        return None in codes

    def send(self, signum: int) -> None:
        for process in self.processes:
            process.send_signal(signum)  # does nothing to a process already reaped

    def kill(self) -> None:
        """SIGKILL what still runs, with whatever it started, and wait for it."""
        for process in self.processes:
            if process.poll() is None:
                self.killed = True
                process.kill()
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
        for process in self.processes:
            process.wait()

    def code(self, rank: int) -> int:
        code = self.processes[rank].returncode
        if self.hang and code == -signal.SIGKILL and rank in self.hang["ending"]:
            return GUARD
        return 128 - code if code < 0 else code

    def has_traceback(self, rank: int) -> bool:
        return rank > 0 and any(line.startswith("Traceback") for line in self.tail(rank, lines=400))

    def tail(self, rank: int, *, lines: int = TAIL_LINES) -> list[str]:
        with open(self._log(rank), "rb") as log:
            size = log.seek(0, os.SEEK_END)
            log.seek(max(self.log_starts[rank], size - 65536))
            return log.read().decode(errors="replace").splitlines()[-lines:]

    def explain(self, rank: int) -> bool:
        """Say on stderr what known errors in the last lines of a rank mean, unless the rank has said it; whether there was one."""
        text = "\n".join(self.tail(rank, lines=400))
        known = None if messages.HEADING in text else messages.explain(text)
        if known:
            sys.stderr.write(f"\n{known}\n")
        return known is not None

    def _log(self, rank: int) -> Path:
        return self.folder / f"rank-{rank}.txt"


def _supervise(group: _Group, requests: list[int], grace: float) -> int:
    """Watch the ranks until the last has ended: forward signals, bring down the others after a failure, kill at the end of patience."""
    seen, terminate_at, kill_at, stopped = 0, float("inf"), float("inf"), False
    while group.running():
        now = time.monotonic()
        if len(requests) > seen:
            if not stopped:
                group.send(signal.SIGTERM)
                stopped, kill_at = True, now + grace
            elif signal.SIGINT in requests[seen:]:
                group.send(signal.SIGINT)
                kill_at = min(kill_at, now + KILL_PATIENCE)
            seen = len(requests)
        if group.failed and terminate_at == float("inf"):
            terminate_at = now + (grace if group.code(group.failed[0]) in (STOPPED, GUARD) else FAIL_PATIENCE)
        if group.hang and not stopped:
            stopped, kill_at = True, now + HANG_PATIENCE
        if now >= terminate_at and not stopped:
            group.send(signal.SIGTERM)
            stopped, kill_at = True, now + KILL_PATIENCE
        if group.failed and stopped and group.code(group.failed[0]) not in (STOPPED, GUARD):
            kill_at = min(kill_at, now + KILL_PATIENCE)
        if now >= kill_at:
            break
        time.sleep(POLL)
    group.kill()
    return _outcome(group)


def _outcome(group: _Group) -> int:
    """The exit code of the run; says on stderr which rank failed and why, unless rank 0 has said it already."""
    if not group.failed:
        if group.killed:
            _say("ranks did not stop in time and were killed; the newest complete checkpoint is what is saved")
        return KILLED if group.killed else 0
    first = group.failed[0]
    # A rank that failed for another reason outweighs ranks that stopped by decision.
    blamed = next((r for r in group.failed if group.code(r) not in (STOPPED, GUARD)), first)
    code = group.code(blamed)
    if group.hang and group.processes[0].returncode != GUARD:
        sys.stderr.write(f"\n{group.hang['text']}")
    if group.hang and code == GUARD:
        return GUARD
    if group.killed and code in (STOPPED, GUARD):
        _say("some ranks did not stop in time and were killed; the newest complete checkpoint is what is saved")
        return KILLED
    said_by_rank_0 = blamed == 0 or (0 in group.failed and group.code(0) == code and not group.has_traceback(blamed))
    if not said_by_rank_0:
        _say(f"rank {blamed} ended with exit code {code}; its last lines:")
        sys.stderr.writelines(f"  [rank {blamed}] {line}\n" for line in group.tail(blamed))
        group.explain(blamed)
    elif blamed == 0 and code > 128:
        _say(f"rank 0 was ended by signal {code - 128}" + (" (out of memory?)" if code == KILLED else ""))
        next((rank for rank in range(1, len(group.processes)) if group.explain(rank)), None)
    return code


def _say(text: str) -> None:
    sys.stderr.write(f"launch: {text}\n")
    sys.stderr.flush()


@contextmanager
def _log_folder(logs: Path | None) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="llmtrain-")) if logs is None else Path(logs)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield folder
    finally:
        if logs is None:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def reserved_port() -> Iterator[int]:
    """A free port, held bound but not listening for as long as the run lasts.

    Rank 0's store can listen on it all the same, both sockets being SO_REUSEADDR, while the kernel gives it to nobody who asks for any
    free port. So two runs started at once cannot meet.
    """
    with socket.socket(socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET) as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("", 0))
        yield holder.getsockname()[1]


@contextmanager
def _requests() -> Iterator[list[int]]:
    """The signals that ask for an end, in the order received; what the caller had set to be ignored stays ignored."""
    received: list[int] = []
    old: dict[int, Callable | int | None] = {}
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(signum) is not signal.SIG_IGN:
            old[signum] = signal.signal(signum, lambda number, frame: received.append(number))
    try:
        yield received
    finally:
        for signum, handler in old.items():
            signal.signal(signum, handler)
