"""The parent's side of the worker processes."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil

BENCH = Path(__file__).resolve().parent.parent


class WorkerError(RuntimeError):
    """A contender could not do what it was asked: `reason` is one line, the message also has what it last printed."""

    def __init__(self, name: str, reason: str, printed: str):
        self.reason = " ".join(reason.split())
        super().__init__(f"{name}: {self.reason}\n{printed}")


class Process:
    """A worker process, asked one thing at a time. Its compile cache is empty at the start unless one is named, so that compile
    times are real."""

    def __init__(self, name: str, *, threads: int, profiled: bool = False, compile_cache: Path | None = None):
        self.name = name
        self.scratch = tempfile.TemporaryDirectory(prefix="bench-train-")
        self.log = open(Path(self.scratch.name) / "log", "w+")  # noqa: SIM115
        path = os.pathsep.join([str(BENCH), str(BENCH.parent), os.environ.get("PYTHONPATH", "")])
        env = dict(
            os.environ, PYTHONPATH=path, OMP_NUM_THREADS=str(threads), TORCHINDUCTOR_CACHE_DIR=str(compile_cache or self.scratch.name)
        )
        env.update(TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1", PYTHONWARNINGS="ignore")
        if profiled:
            env["TORCHINDUCTOR_CPP_ENABLE_KERNEL_PROFILE"] = "1"
        command = [sys.executable, "-m", "train_peers.worker"]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True, env=env, cwd=self.scratch.name
        )

    def ask(self, do: str, **request) -> dict:
        """The worker's answer; raises WorkerError if it failed or died."""
        try:
            self.process.stdin.write(json.dumps({"do": do, **request}) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise WorkerError(self.name, f"the process ended with {self.process.wait()}", self._tail())
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerError(self.name, answer["error"], self._tail())
        return answer

    def cpu_seconds(self) -> float:
        """CPU time used so far, with that of its child processes."""
        root = psutil.Process(self.process.pid)
        total = 0.0
        for process in [root, *root.children(recursive=True)]:
            try:
                times = process.cpu_times()
                total += times.user + times.system
            except psutil.NoSuchProcess:
                continue
        return total

    def close(self) -> None:
        """End it."""
        if self.process.poll() is None:
            self.process.stdin.close()
            try:
                self.process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self.process.stdout.close()
        self.log.close()
        self.scratch.cleanup()

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _tail(self, lines: int = 12) -> str:
        self.log.flush()
        return "\n".join(Path(self.log.name).read_text().splitlines()[-lines:])
