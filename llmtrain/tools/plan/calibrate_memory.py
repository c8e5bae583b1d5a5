"""What a process that trains holds on a processor beside its tensors, and what its allocator keeps of them: small runs."""

import json
import math
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
from llmtrain.simulate.memory import Memory, memory
from llmtrain.simulate.of_config import case_of

NOTHING = {"vocab_size": 4096, "layers": 1, "hidden": 64, "attention": {"heads": 1}, "ffn": {"hidden": 128}, "max_seq_len": 256}
SMALL = {"vocab_size": 4096, "layers": 4, "hidden": 640, "attention": {"heads": 10}, "ffn": {"hidden": 1600}, "max_seq_len": 256}
STEPS = 3
LINES = 200
"""Of a document of the text: longer than the sequences, as the planner has it."""


def retained(description: dict[str, Any], ranks: int) -> tuple[float, dict[str, float]]:
    """(bytes of a process that trains nothing, what its allocator keeps, by `Rates.retained`'s names).

    A run holds more than its tensors take at any time, and which collectives it has decides how much more. Sharded parameters are measured
    over `ranks`, the other axes over two.
    """
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        corpus(folder)
        machine = folder / "machine.yaml"
        machine.write_text(yaml.safe_dump(description))
        least, nothing = _held(NOTHING, folder, machine, {"dp_shard": ranks})
        one, tensors = _held(SMALL, folder, machine, {})
        found = {"all": max(0.0, (one - least) / (tensors.total - nothing.total) - 1)}
        process = max(0.0, least - (1 + found["all"]) * nothing.total)

        def rest(parallel: dict[str, int]) -> tuple[float, Memory]:
            held, said = _held(SMALL, folder, machine, parallel)
            return held - process - (1 + found["all"]) * said.total, said

        if ranks > 1:
            found["fsdp"] = rest({"dp_shard": ranks})[0] / tensors.parameters
            sharded = {"tp": 0.0, "pp": 0.0, "cp": found["fsdp"] * tensors.parameters}  # cp's ranks share the parameters, too
            for axis, known in sharded.items():
                more, said = rest({axis: 2})
                found[axis] = (more - known) / said.activations
        return process, {name: max(0.0, value) for name, value in found.items()}


def _held(model: dict[str, Any], folder: Path, machine: Path, parallel: dict[str, int]) -> tuple[float, Memory]:
    """Peak bytes of rank 0, and what the planner says that it holds."""
    ranks = math.prod(parallel.values())
    values = {
        "name": "-".join(map(str, (model["hidden"], *parallel))), "output": str(folder / "runs"), "device": "cpu", "precision": "fp32",
        "model": model, "data": {"train": [str(folder / "text-train")]},
        "train": {"seq_len": 256, "micro_batch": 2, "global_batch": 4 * ranks, "steps": STEPS, "compile": "off"},
        "parallel": parallel, "checkpoint": {"every": 0, "resume": "none"}, "metrics": {"every": 1},
    }  # fmt: skip
    file = folder / f"{values['name']}.yaml"
    file.write_text(json.dumps(values | {"tokenizer": {"path": str(folder / "tokenizer.model")}}))
    command("train", "-c", str(file))
    lines = (folder / "runs" / values["name"] / "metrics.jsonl").read_text().splitlines()
    measured = max(line.get("memory_gb", 0.0) for line in map(json.loads, lines)) * 2**30
    return measured, memory(case_of(RunConfig.load(values), load(str(machine)), ranks))[0]


def corpus(folder: Path) -> None:
    """A text of made-up words, its tokenizer of 4,096 pieces and its tokens."""
    draw = random.Random(1)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(3, 9))) for _ in range(8000)]
    lines = [" ".join(draw.choices(words, k=12)) for _ in range(12_000)]
    documents = ("\n".join(lines[first : first + LINES]) for first in range(0, len(lines), LINES))
    (folder / "text.txt").write_text("\n\n".join(documents))
    command("data", "tokenizer", "--input", f"{folder}/text.txt", "--vocab-size", "4096", "--out", f"{folder}/tokenizer.model")
    rest = ("--tokenizer", f"{folder}/tokenizer.model", "--out", f"{folder}/text", "--validation", "0.05", "--split", "blank")
    command("data", "tokenize", "--input", f"{folder}/text.txt", *rest)


def command(*words: str) -> None:
    """Run a command of llmtrain, one thread each unless OMP_NUM_THREADS is set. Raises UserError with its output where it fails."""
    env = {"OMP_NUM_THREADS": "1"} | os.environ
    found = subprocess.run([sys.executable, "-m", "llmtrain", *words], env=env, capture_output=True, text=True)
    if found.returncode:
        raise UserError(f"llmtrain {words[0]}: {found.stdout[-2000:]}{found.stderr[-4000:]}")
