"""Predicted against measured step time and peak memory of a dozen runs on this machine's CPU, 1 to 4 processes over every axis.

    .venv/bin/python bench/plan.py                     # calibrates for 1, 2 and 4 ranks, then the runs: bench/results/plan-cpu.md
    .venv/bin/python bench/plan.py --only tp2,pp2 --steps 4 --repeats 1 --out /tmp/try.md
    .venv/bin/python bench/plan.py --measured bench/results/plan-cpu.md   # calibrates and predicts anew beside what a page has measured

Calibration measures products of 1,024 x 768 x 768, element-wise operators, attention and gloo, and the memory of a run of next to no model;
the runs have other shapes. bench/README.md says more.
"""

import argparse
import json
import tempfile
import time
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from statistics import fmean, median

from train_peers.report import commit, machine

from llmtrain.config.run import RunConfig
from llmtrain.hardware import load
from llmtrain.simulate.case import Case
from llmtrain.simulate.events import replay
from llmtrain.simulate.memory import memory
from llmtrain.simulate.of_config import case_of
from llmtrain.simulate.rates import fitted
from llmtrain.tools.plan.calibrate_memory import command, corpus

ROOT = Path(__file__).resolve().parent.parent
DENSE = {
    "vocab_size": 4096,
    "layers": 6,
    "hidden": 512,
    "attention": {"heads": 8, "kv_heads": 4},
    "ffn": {"hidden": 1408},
    "max_seq_len": 512,
}
MIXTURE = {**DENSE, "layers": 4, "hidden": 384, "attention": {"heads": 6}, "ffn": {"kind": "moe", "experts": 8, "top_k": 2, "hidden": 512}}
TRAIN = {"seq_len": 512, "global_batch": 8, "micro_batch": 2, "compile": "off"}


@dataclass
class Run:
    """One of the dozen."""

    name: str
    ranks: int
    parallel: dict = field(default_factory=dict)
    model: dict = field(default_factory=lambda: DENSE)
    train: dict = field(default_factory=dict)
    precision: str = "fp32"

    def config(self, folder: Path, steps: int) -> dict:
        """As YAML has it."""
        data = {"train": [str(folder / "text-train")]}
        return {
            "name": self.name, "output": str(folder / "runs"), "device": "cpu", "model": self.model, "data": data,
            "precision": self.precision,
            "tokenizer": {"path": str(folder / "tokenizer.model")}, "train": {**TRAIN, **self.train, "steps": steps},
            "parallel": self.parallel, "checkpoint": {"every": 0, "resume": "none"}, "metrics": {"every": 1},
        }  # fmt: skip


RUNS = [
    Run("one", 1),
    Run("one-full", 1, train={"recompute": "full"}),
    Run("one-bf16", 1, precision="bf16"),
    Run("one-moe", 1, model=MIXTURE),
    Run("dp2", 2, {"dp_shard": 2}),
    Run("tp2", 2, {"tp": 2}),
    Run("pp2", 2, {"pp": 2}),
    Run("cp2", 2, {"cp": 2}),
    Run("ep2", 2, {"dp_shard": 2, "ep": 2}, MIXTURE),
    Run("dp4", 4, {"dp_shard": 4}),
    Run("tp2-pp2", 4, {"tp": 2, "pp": 2}),
    Run("dp2-tp2", 4, {"dp_shard": 2, "tp": 2}),
]


def main() -> None:
    """Measure, predict, write."""
    options = arguments()
    chosen = [run for run in RUNS if not options.only or run.name in options.only.split(",")]
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        corpus(folder)
        machines = {ranks: calibrated(folder, ranks) for ranks in sorted({run.ranks for run in chosen})}
        known = measured_before(Path(options.measured)) if options.measured else {}
        rows = [row(run, folder, machines[run.ranks], options, known.get(run.name)) for run in chosen]
    Path(options.out).write_text(page(rows, options))
    print(Path(options.out).read_text())


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help=f"of {','.join(run.name for run in RUNS)}")
    parser.add_argument("--steps", type=int, default=12, help="steps of a run (12), of which the first two are not timed")
    parser.add_argument("--repeats", type=int, default=2, help="times that each run is made (2)")
    parser.add_argument("--measured", metavar="PAGE", help="a page of this bench: its measured columns are taken, and predicted anew")
    parser.add_argument("--out", default=str(ROOT / "bench" / "results" / "plan-cpu.md"))
    return parser.parse_args()


def case(run: Run, folder: Path, steps: int, machine: Path) -> Case:
    """What the planner is asked of a run."""
    cfg = RunConfig.load({key: value for key, value in run.config(folder, steps).items() if key != "tokenizer"})
    return case_of(cfg, load(str(machine)), run.ranks)


def measured_before(page: Path) -> dict[str, tuple[float, float, float]]:
    """Seconds, spread and bytes of every run of a page of this bench."""
    rows = [[cell.strip() for cell in line.strip("| \n").split("|")] for line in page.read_text().splitlines() if line.startswith("| ")]
    return {cells[0]: (_number(cells[2]), _number(cells[3]) / 100, _number(cells[6]) * 2**20) for cells in rows[1:]}


def _number(cell: str) -> float:
    return float(cell.split()[0].rstrip("%"))


def calibrated(folder: Path, ranks: int) -> Path:
    """This machine's description for so many ranks."""
    out = folder / f"cpu-{ranks}.yaml"
    command("plan", "calibrate", "--memory", "--ranks", str(ranks), "--out", str(out))
    return out


@dataclass(frozen=True)
class Row:
    """A run, measured and predicted: seconds, and bytes of rank 0."""

    run: Run
    seconds: tuple[float, ...]
    memory: float
    predicted: float
    predicted_memory: float

    @property
    def measured(self) -> float:
        """The mean of the repeats."""
        return fmean(self.seconds)

    @property
    def spread(self) -> float:
        """Of the repeats: largest over smallest, less 1."""
        return max(self.seconds) / min(self.seconds) - 1


def row(run: Run, folder: Path, machine: Path, options: argparse.Namespace, known: tuple[float, float, float] | None) -> Row:
    """Make one run as often as asked, if it is not `known`, and predict it."""
    print(f"{run.name} ...", flush=True)
    if known:
        seconds, spread, held = known
        times = (2 * seconds * (1 + spread) / (2 + spread), 2 * seconds / (2 + spread))  # two of this mean and spread
    else:
        found = [measure(run, folder / str(repeat), folder, options.steps) for repeat in range(options.repeats)]
        times, held = tuple(time for time, _ in found), max(size for _, size in found)
    asked = case(run, folder, options.steps, machine)
    return Row(run, times, held, replay(asked, fitted()).step.seconds, memory(asked)[0].total)


def measure(run: Run, place: Path, folder: Path, steps: int) -> tuple[float, float]:
    """Median seconds of a step after the second, and the peak bytes of rank 0."""
    place.mkdir(exist_ok=True)
    values = run.config(folder, steps) | {"output": str(place)}
    file = place / f"{run.name}.yaml"
    file.write_text(json.dumps(values))
    command("train", "-c", str(file))
    lines = [json.loads(line) for line in (place / run.name / "metrics.jsonl").read_text().splitlines()]
    train = [line for line in lines if "tokens_per_second" in line][min(2, steps - 1) :]
    tokens = values["train"]["seq_len"] * values["train"]["global_batch"]
    return tokens / median(line["tokens_per_second"] for line in train), max(line["memory_gb"] for line in train) * 2**30


def page(rows: list[Row], options: argparse.Namespace) -> str:
    """The result."""
    pairs = [(a, b) for a, b in combinations(rows, 2)]
    right = sum((a.measured < b.measured) == (a.predicted < b.predicted) for a, b in pairs)
    how = f"{time.strftime('%Y-%m-%d')}, commit {commit()}; {machine()}"
    how += (
        "; calibrated and predicted anew (`--measured`) beside what an earlier call has measured"
        if options.measured
        else f"; {options.repeats} repeats of {options.steps} steps"
    )
    lines = ["# Predicted and measured on a CPU", "", f"{how}."]
    lines += ["", "| run | ranks | step | spread of repeats | predicted | error | memory | predicted | error |"]
    lines += ["|---|---|---|---|---|---|---|---|---|"]
    for one in rows:
        off, size = one.predicted / one.measured - 1, one.predicted_memory / one.memory - 1
        cells = f"{one.measured:.3f} s | {one.spread:.1%} | {one.predicted:.3f} s | {off:+.0%}"
        sizes = f"{one.memory / 2**20:.0f} MiB | {one.predicted_memory / 2**20:.0f} MiB | {size:+.0%}"
        lines.append(f"| {one.run.name} | {one.run.ranks} | {cells} | {sizes} |")
    mean, held = (fmean(abs(value) for value in found) for found in _errors(rows))
    order = f"{right} of {len(pairs)} pairs in the right order" if pairs else "one run"
    return "\n".join([*lines, "", f"Mean error of the time {mean:.1%}, of memory {held:.1%}; {order}."]) + "\n"


def _errors(rows: list[Row]) -> tuple[list[float], list[float]]:
    return [one.predicted / one.measured - 1 for one in rows], [one.predicted_memory / one.memory - 1 for one in rows]


if __name__ == "__main__":
    main()
