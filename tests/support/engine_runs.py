"""Whole runs as a user starts them, for tests of engines and of fine-tuning: the command, its losses, a toy and a few facts to learn."""

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from chat_tokenizer import byte_level

ROOT = Path(__file__).parents[2]
FACTS = [(f"What is {a} + {b}?", f"It is {a + b}.") for a, b in ((1, 2), (2, 2), (4, 5), (3, 3))]
TOY = """
name: base
device: cpu
model: {layers: 2, hidden: 64, vocab_size: 400, max_seq_len: 128, attention: {heads: 2}, ffn: {hidden: 128}, tie_embeddings: true}
tokenizer: {path: tokenizer}
data: {train: [{path: facts.jsonl, template: chatml}]}
train: {steps: 1, seq_len: 64, global_batch: 2}
checkpoint: {every: 0, export: hf}
"""
"""The configuration of a toy whose weights, runs/base/hf, are there to be tuned on the facts."""
LINE = "In year {} the king said {} words to the queen, and nobody heard them at all. "
MEGATRON_ON_CPU = ("--engine", "megatron", "--plugins", "[megatron_cpu]")
"""The plugin lets megatron-core do without CUDA in the processes of the run."""


def write_facts(place: Path) -> None:
    """FACTS as conversations in facts.jsonl, and a tokenizer."""
    byte_level(place / "tokenizer")
    write_chats(place / "facts.jsonl", FACTS)


def write_chats(path: Path, facts: Iterable[tuple[str, str]]) -> None:
    """Questions and answers as conversations."""
    path.write_text("".join(json.dumps({"messages": messages(*fact)}) + "\n" for fact in facts))


def messages(question: str, answer: str | None = None) -> list[dict]:
    """A question and, if there is one, its answer, as a conversation has them."""
    asked = [{"role": "user", "content": question}]
    return asked if answer is None else [*asked, {"role": "assistant", "content": answer}]


def llmtrain(place: Path, *words: str, code: int = 0, **env: str) -> str:
    """What `llmtrain WORDS` prints in `place`, in processes of its own."""
    known = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests/support"), os.environ.get("PYTHONPATH", "")])
    known |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "PYTHONWARNINGS": "ignore"} | env
    command = [sys.executable, "-m", "llmtrain", *words]
    done = subprocess.run(command, cwd=place, env=known, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL)
    assert done.returncode == code, f"{done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout + done.stderr


def losses(run: Path, kind: str = "train") -> list[float]:
    """Of a run folder, by step."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if line["kind"] == kind]
