"""Are all cores used by one process and by two ranks? CPU time per wall time of the steps, and tokens/s, with and without affinity.

    make quickstart                       # makes the tokens
    python bench/affinity.py --rounds 5   # writes bench/results/affinity-cpu.md

Each run is the quickstart's model for some steps. From the middle of the run to its end the CPU time of all its processes is read from the
kernel; divided by the wall time it is the number of busy cores. Arms are interleaved and the medians reported.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
ARMS = {
    "one process": (),
    "two ranks, affinity auto": ("--parallel.dp_shard", "2"),
    "two ranks, affinity off": ("--parallel.dp_shard", "2", "--parallel.affinity", "off"),
    "two ranks, affinity off, as many threads as cores each": (
        "--parallel.dp_shard", "2", "--parallel.affinity", "off", "--parallel.threads", str(os.cpu_count()),
    ),
}  # fmt: skip


def cpu_seconds(process: psutil.Process) -> float:
    """User and system time of a process and its children that run."""
    total = 0.0
    for one in [process, *process.children(recursive=True)]:
        try:
            times = one.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return total


def last_line(metrics: Path) -> dict:
    """The last whole training line of a run."""
    lines = metrics.read_text().split("\n")[:-1] if metrics.exists() else []
    steps = [line for line in map(json.loads, lines) if line["kind"] == "train"]
    return steps[-1] if steps else {"step": 0, "tokens": 0}


def measure(words: tuple[str, ...], *, steps: int, folder: Path) -> tuple[float, float]:
    """(busy cores, tokens/s) over the second half of a run."""
    options = ["--output", folder, "--name", "run", "--train.steps", steps, "--checkpoint.every", 0, "--checkpoint.export", "none"]
    options += ["--checkpoint.resume", "none", "--no-metrics.tensorboard", "--no-metrics.bigram_baseline", "--metrics.sample", "null"]
    options += ["--train.validate_every", 0, "--data.validation", "[]", "--parallel.dp_shard", 1]
    command = [sys.executable, "-m", "llmtrain", "train", "-c", "configs/quickstart.yaml", *map(str, options), *words]
    env = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    started = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL)
    process, metrics, begin, end = psutil.Process(started.pid), folder / "run/metrics.jsonl", None, None
    while started.poll() is None and (end is None or end[2]["step"] < steps - 1):
        line = last_line(metrics)
        if line["step"] >= steps // 2:
            now = (time.perf_counter(), cpu_seconds(process), line)
            begin, end = begin or now, now
        time.sleep(0.02)
    if started.wait() or begin is None:
        raise SystemExit(f"the run failed: {' '.join(words)}")
    wall = end[0] - begin[0]
    return (end[1] - begin[1]) / wall, (end[2]["tokens"] - begin[2]["tokens"]) / wall


def main() -> None:
    """Measure all arms and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results/affinity-cpu.md")
    options = parser.parse_args()
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in ARMS}
    load = os.getloadavg()[0]
    for number in range(options.rounds):
        for name, words in ARMS.items():
            with tempfile.TemporaryDirectory() as folder:
                found[name].append(measure(words, steps=options.steps, folder=Path(folder)))
            print(f"round {number + 1}: {name}: {found[name][-1][0]:.2f} busy cores, {found[name][-1][1]:,.0f} tokens/s", flush=True)
    rows = ["| run | busy cores (median) | tokens/s (median) | tokens/s (all) |", "|---|---|---|---|"]
    for name, pairs in found.items():
        busy, speed = zip(*pairs)
        every = ", ".join(f"{s:,.0f}" for s in speed)
        rows.append(f"| {name} | {statistics.median(busy):.2f} | {statistics.median(speed):,.0f} | {every} |")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    head = (
        f"# Cores in use\n\n`python bench/affinity.py --rounds {options.rounds} --steps {options.steps}`, {date.today()}, commit {commit}, "
        f"{os.cpu_count()} CPUs, {platform.machine()}; load average before the start {load:.1f}, "
        f"so the machine was {'idle' if load < 0.5 else 'busy with other work'}.\n"
        "Quickstart model; CPU time of all processes over wall time, from the middle of the run to its end.\n\n"
    )
    options.out.write_text(head + "\n".join(rows) + "\n")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
