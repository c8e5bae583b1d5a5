"""BigMac, fine-grained and vanilla experts at equal steps and equal parameters, on real text: three seeds each.

    make quickstart                                  # makes the tokens
    python examples/bigmac/quality.py --rates        # half of the steps at several learning rates, one seed: which one to take
    python examples/bigmac/quality.py                # nine runs; resumes where it was stopped; writes quality.md, .json and .png

Experts are two matrices with a gelu between them. Of width D = 128 and r = 1/4: fine-grained D -> rD -> D, BigMac rD -> D -> rD, vanilla
D -> 4D -> D, sixteen times as large and therefore a sixteenth as many.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
WIDTH = 128
ARMS = {
    "vanilla": {"experts": 4, "top_k": 1, "hidden": 4 * WIDTH, "router.renormalise": False},
    "fine-grained": {"experts": 64, "top_k": 8, "hidden": WIDTH // 4},
    "BigMac": {"experts": 64, "top_k": 8, "hidden": WIDTH, "descend": WIDTH // 4},
}
SEEDS = (1, 2, 3)
RATES = (1e-3, 3e-3, 1e-2)
RATE = 3e-3
STEPS = 400


def overrides(arm: str, *, seed: int, rate: float, steps: int, output: Path) -> list[str]:
    """The command line of a run, from `--name` on."""
    options = {"name": f"{arm}-lr{rate:g}-steps{steps}-seed{seed}", "output": output, "seed": seed, "optim.lr": rate, "train.steps": steps}
    options |= {f"model.ffn.{key}": str(value).lower() for key, value in ARMS[arm].items()}
    return [f"--{key}={value}" for key, value in options.items()]


def train(job: tuple[str, int, float, int], output: Path) -> dict:
    """Take one run to its end, unless it is there already, and return what came out."""
    arm, seed, rate, steps = job
    words = overrides(arm, seed=seed, rate=rate, steps=steps, output=output)
    folder = output / words[0].removeprefix("--name=")
    if not (folder / "done").exists():
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "output.txt").open("a") as printed:
            command = [sys.executable, "-m", "llmtrain", "train", "-c", str(HERE / "quality.yaml"), "--device", "cpu", *words]
            process = subprocess.Popen(command, cwd=ROOT, stdout=printed, stderr=subprocess.STDOUT)
            _, status, used = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(f"{folder.name} ended with {process.returncode}; {folder / 'output.txt'} has what it printed")
        (folder / "done").write_text(f"{used.ru_utime + used.ru_stime:.1f}\n")
    return {"arm": arm, "seed": seed, "rate": rate, "steps": steps, "cpu_seconds": float((folder / "done").read_text())} | outcome(folder)


def outcome(folder: Path) -> dict:
    """Validation losses by step, and how evenly experts were used in the last tenth of the steps."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "train"]
    last = [load for line in steps[-max(1, len(steps) // 10) :] for load in line["experts"]["load"]]
    validation = {line["step"]: line["loss"] for line in lines if line["kind"] == "validation"}
    return {
        "validation": [[step, validation[step]] for step in sorted(validation)],
        "load": statistics.mean(last),
    }


def parameters(arm: str) -> dict[str, int]:
    """Total and active parameters of an arm without the embeddings."""
    from llmtrain.config.load import load
    from llmtrain.config.parameters import count_parameters
    from llmtrain.stages.pretrain import with_vocabulary

    words = overrides(arm, seed=1, rate=RATE, steps=1, output=ROOT)
    counts = count_parameters(with_vocabulary(load(HERE / "quality.yaml", words).run).model)
    return {"total": counts["without embeddings"], "active": counts["active"] - counts["embedding"] - counts["head"]}


def final(runs: list[dict], arm: str) -> list[float]:
    """Last validation losses of an arm, by seed."""
    return [run["validation"][-1][1] for run in runs if run["arm"] == arm]


def table(runs: list[dict], counts: dict[str, dict]) -> str:
    """Markdown: a row per arm."""
    rows = [
        "| experts | parameters without embeddings, active | validation loss by seed | mean | spread | max / mean load | CPU time |",
        "|" + "---|" * 7,
    ]
    for arm in ARMS:
        mine, losses = [run for run in runs if run["arm"] == arm], final(runs, arm)
        load, cpu = (statistics.median(run[key] for run in mine) for key in ("load", "cpu_seconds"))
        rows.append(
            f"| {arm} | {counts[arm]['total'] / 1e6:.3f} M, {counts[arm]['active'] / 1e6:.3f} M | {', '.join(f'{x:.4f}' for x in losses)} "
            f"| {statistics.mean(losses):.4f} | {max(losses) - min(losses):.4f} | {load:.2f} | {cpu:.0f} s |"
        )
    return "\n".join(rows)


def verdicts(runs: list[dict]) -> str:
    """A sentence for each pair of arms: which is lower, or that the spreads of the seeds overlap."""
    said = []
    for one, other in (("BigMac", "fine-grained"), ("BigMac", "vanilla"), ("fine-grained", "vanilla")):
        a, b = final(runs, one), final(runs, other)
        if max(min(a), min(b)) <= min(max(a), max(b)):
            said.append(f"- {one} and {other}: the spreads of the seeds overlap, so neither can be called better.")
        else:
            lower, higher = (one, other) if max(a) < min(b) else (other, one)
            gap = abs(statistics.mean(a) - statistics.mean(b))
            said.append(f"- {lower} is lower than {higher} in every pair of seeds, by {gap:.4f} nats/token in the mean.")
    return "\n".join(said)


def plot(runs: list[dict], path: Path) -> None:
    """Validation losses over the steps: a line per seed, and the last ones larger."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
    for at, (arm, color) in enumerate(zip(ARMS, plt.cm.tab10.colors)):
        for run in (run for run in runs if run["arm"] == arm):
            left.plot(*zip(*run["validation"]), color=color, lw=1, label=arm if run["seed"] == SEEDS[0] else None)
        right.plot([at] * len(SEEDS), final(runs, arm), "o", color=color)
    left.set(xlabel="step", ylabel="validation loss (nats/token)", title="each seed")
    left.legend()
    right.set(title="after the last step", xlim=(-0.5, len(ARMS) - 0.5))
    right.set_xticks(range(len(ARMS)), list(ARMS))
    right.grid(axis="y", alpha=0.4)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def write(runs: list[dict]) -> None:
    """quality.json, quality.md and quality.png beside this file."""
    made = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, one thread a run",
        "date": time.strftime("%Y-%m-%d"),
        "commit": subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip(),
        "command": "python examples/bigmac/quality.py",
    }
    counts = {arm: parameters(arm) for arm in ARMS}
    (HERE / "quality.json").write_text(json.dumps(made | {"parameters": counts, "runs": runs}, indent=1) + "\n")
    plot(runs, HERE / "quality.png")
    (HERE / "quality.md").write_text(
        f"""# Quality at equal steps

`{made["command"]}`, {made["date"]}, commit {made["commit"][:10]}, {made["machine"]}.
{STEPS} steps of 16 x 128 tokens of the quickstart's plays, learning rate {RATE:g}, float32.
Validation on 512 sequences of 128 tokens. Spread: highest less lowest seed.

{table(runs, counts)}

{verdicts(runs)}

![validation losses](quality.png)
"""
    )
    print((HERE / "quality.md").read_text())


def main() -> None:
    """Run what is missing, two runs at a time, then write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", action="store_true", help="compare learning rates instead, in runs of half of the steps")
    parser.add_argument("--output", type=Path, default=ROOT / "runs/bigmac_quality")
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    jobs = list(product(ARMS, (0,), RATES, (STEPS // 2,))) if args.rates else list(product(ARMS, SEEDS, (RATE,), (STEPS,)))
    runs = []
    with ThreadPoolExecutor(args.workers) as pool:
        for run in pool.map(lambda job: train(job, args.output), jobs):
            runs.append(run)
            loss = run["validation"][-1][1]
            print(f"{run['arm']}, seed {run['seed']}, rate {run['rate']:g}: {loss:.4f}, {run['cpu_seconds']:.0f} s of CPU time", flush=True)
    if not args.rates:
        write(runs)


if __name__ == "__main__":
    main()
