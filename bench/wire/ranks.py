"""The launcher's side: ranks of one world, each in its namespace, asked one thing at a time."""

import json
import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from llmtrain.tools.launch import reserved_port
from wire.network import Network

BENCH = Path(__file__).resolve().parent.parent
PORT = 29500
"""Where ranks meet, in namespaces that have no other use."""


class RankError(RuntimeError):
    """A rank could not do what it was asked; the message has what it last printed."""


class Ranks:
    """A context: `count` processes of the script `worker`, in the namespaces of `network`, or on loopback without one.

    The script answers requests as `train_peers.answering` reads them: a JSON mapping per line, `do` naming what is asked for.
    """

    def __init__(self, count: int, network: Network | None, *, worker: Path):
        self.count, self.network, self.worker = count, network, worker
        self.place = ExitStack()
        self.logs = tempfile.TemporaryDirectory(prefix="wire-")
        self.processes: list[subprocess.Popen] = []

    def __enter__(self) -> "Ranks":
        try:
            port = PORT if self.network else self.place.enter_context(reserved_port())
            self.processes += [self._start(rank, port) for rank in range(self.count)]
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.wait()
            process.stdin.close()
            process.stdout.close()
        self.logs.cleanup()
        self.place.close()

    def ask(self, do: str, **request) -> list:
        """The answers by rank. Raises RankError if a rank failed or died."""
        for process in self.processes:
            process.stdin.write(json.dumps({"do": do, **request}) + "\n")
            process.stdin.flush()
        answers = []
        for rank, process in enumerate(self.processes):
            line = process.stdout.readline()
            answer = json.loads(line) if line else {"error": f"the process ended with {process.wait()}"}
            if isinstance(answer, dict) and "error" in answer:
                printed = self._log(rank).read_text().splitlines()[-15:]
                raise RankError("\n".join([f"rank {rank}: {answer['error']}", *printed]))
            answers.append(answer)
        return answers

    def _start(self, rank: int, port: int) -> subprocess.Popen:
        there = {"MASTER_ADDR": "127.0.0.1"}
        if self.network is not None:
            there = {"MASTER_ADDR": self.network.address(0), "GLOO_SOCKET_IFNAME": "eth0"}
        there |= {"MASTER_PORT": str(port), "WORLD_SIZE": str(self.count), "RANK": str(rank), "LOCAL_RANK": str(rank)}
        path = os.pathsep.join([str(BENCH.parent), str(BENCH), os.environ.get("PYTHONPATH", "")])
        with self._log(rank).open("w") as log:
            return subprocess.Popen(
                [*(self.network.command(rank) if self.network else []), sys.executable, str(self.worker)],
                env=os.environ | there | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "PYTHONWARNINGS": "ignore"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,  # Ctrl-C is for the launcher, which ends the ranks
            )

    def _log(self, rank: int) -> Path:
        return Path(self.logs.name) / f"rank-{rank}.txt"
