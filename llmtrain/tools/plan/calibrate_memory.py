"""What a process that trains holds on a processor beside its tensors, and what its allocator keeps of them: two runs of small models."""

import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from llmtrain.config.run import RunConfig
from llmtrain.errors import UserError
from llmtrain.hardware import load
from llmtrain.simulate.memory import peak
from llmtrain.simulate.of_config import case_of

NOTHING = {"vocab_size": 4096, "layers": 1, "hidden": 64, "attention": {"heads": 1}, "ffn": {"hidden": 128}, "max_seq_len": 256}
SMALL = {"vocab_size": 4096, "layers": 3, "hidden": 640, "attention": {"heads": 10}, "ffn": {"hidden": 1600}, "max_seq_len": 256}
STEPS = 3


def retained(description: dict[str, Any], ranks: int) -> tuple[float, float]:
    """(bytes of a process that trains nothing, bytes that it holds for each byte of tensors), by runs over `ranks` with sharded parameters.

    Allocators keep what is freed, each thread's its own, so that a run holds more than its tensors take at any time.
    """
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        corpus(folder)
        machine = folder / "machine.yaml"
        machine.write_text(yaml.safe_dump(description))
        found = [_held(model, folder, machine, ranks) for model in (NOTHING, SMALL)]
    (least, said_least), (most, said_most) = found
    factor = max(1.0, (most - least) / (said_most - said_least))
    return max(0.0, least - factor * said_least), factor


def _held(model: dict[str, Any], folder: Path, machine: Path, ranks: int) -> tuple[float, float]:
    """Peak bytes of rank 0, and those that the planner says."""
    values = {
        "name": f"hidden-{model['hidden']}", "output": str(folder / "runs"), "device": "cpu", "precision": "fp32", "model": model,
        "data": {"train": [str(folder / "text-train")]},
        "train": {"seq_len": 256, "micro_batch": 2, "global_batch": 4 * ranks, "steps": STEPS, "compile": "off"},
        "parallel": {"dp_shard": ranks}, "checkpoint": {"every": 0, "resume": "none"}, "metrics": {"every": 1},
    }  # fmt: skip
    file = folder / f"{values['name']}.yaml"
    file.write_text(json.dumps(values | {"tokenizer": {"path": str(folder / "tokenizer.model")}}))
    command("train", "-c", str(file))
    lines = (folder / "runs" / values["name"] / "metrics.jsonl").read_text().splitlines()
    measured = max(line.get("memory_gb", 0.0) for line in map(json.loads, lines)) * 2**30
    return measured, peak(case_of(RunConfig.load(values), load(str(machine)), ranks))


def corpus(folder: Path) -> None:
    """A text of made-up words, its tokenizer of 4,096 pieces and its tokens."""
    draw = random.Random(1)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(3, 9))) for _ in range(8000)]
    (folder / "text.txt").write_text("\n".join(" ".join(draw.choices(words, k=12)) for _ in range(12_000)))
    command("data", "tokenizer", "--input", f"{folder}/text.txt", "--vocab-size", "4096", "--out", f"{folder}/tokenizer.model")
    rest = ("--tokenizer", f"{folder}/tokenizer.model", "--out", f"{folder}/text", "--validation", "0.05", "--split", "line")
    command("data", "tokenize", "--input", f"{folder}/text.txt", *rest)


def command(*words: str) -> None:
    """Run a command of llmtrain, one thread each unless OMP_NUM_THREADS is set. Raises UserError with its output where it fails."""
    env = {"OMP_NUM_THREADS": "1"} | os.environ
    found = subprocess.run([sys.executable, "-m", "llmtrain", *words], env=env, capture_output=True, text=True)
    if found.returncode:
        raise UserError(f"llmtrain {words[0]}: {found.stdout[-2000:]}{found.stderr[-4000:]}")
