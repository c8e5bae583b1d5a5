"""The parent's side: the ranks of one world, asked one thing at a time."""

import json
import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

from train_peers.shape import Shape

from llmtrain.tools.launch import reserved_port
from mesh_worlds.cases import Case

BENCH = Path(__file__).resolve().parent.parent


class WorldError(RuntimeError):
    """A rank could not do what it was asked; the message has what it last printed."""


class World:
    """`side` is `ours`, `hand`, or an engine by name. Its processes sleep while nothing is asked of them. Give it a mesh with `build`."""

    def __init__(self, side: str, ranks: int):
        self.side, self.name = side, side
        self.place = ExitStack()
        self.scratch = tempfile.TemporaryDirectory(prefix="bench-parallel-")
        path = os.pathsep.join([str(BENCH), str(BENCH.parent), str(BENCH.parent / "tests/support"), os.environ.get("PYTHONPATH", "")])
        env = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        env |= {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": str(ranks)}
        self.logs = [open(Path(self.scratch.name) / f"log-{rank}", "w") for rank in range(ranks)]  # noqa: SIM115
        self.ranks = [
            subprocess.Popen(
                [sys.executable, "-m", "mesh_worlds.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=env | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                cwd=self.scratch.name,
            )
            for rank, log in enumerate(self.logs)
        ]

    def build(self, case: Case, shape: Shape, *, weights: Path) -> None:
        """Join a world of this mesh with a new model; what was there before is left."""
        self.name = f"{case.name}, {self.side}"
        self.place.close()
        port = self.place.enter_context(reserved_port())
        self.ask("build", side=self.side, case=case.name, shape=asdict(shape), weights=str(weights), port=port)

    def ask(self, do: str, **request) -> list[dict]:
        """The answers by rank; raises WorldError if a rank failed or died."""
        for process in self.ranks:
            process.stdin.write(json.dumps({"do": do, **request}) + "\n")
            process.stdin.flush()
        answers = []
        for rank, process in enumerate(self.ranks):
            line = process.stdout.readline()
            answer = json.loads(line) if line else {"error": f"the process ended with {process.wait()}"}
            if "error" in answer:
                printed = Path(self.logs[rank].name).read_text().splitlines()[-15:]
                raise WorldError("\n".join([f"{self.name}, rank {rank}: {answer['error']}", *printed]))
            answers.append(answer)
        return answers

    def close(self) -> None:
        """End it."""
        for process in self.ranks:
            if process.poll() is None:
                process.stdin.close()
        for process in self.ranks:
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            process.stdout.close()
        for log in self.logs:
            log.close()
        self.scratch.cleanup()
        self.place.close()

    def __enter__(self) -> "World":
        return self

    def __exit__(self, *_) -> None:
        self.close()
