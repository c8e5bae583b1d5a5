"""Pangu Ultra's norms and initialisation at 94 layers, over a learning-rate sweep up to divergence.

    make quickstart                                  # makes the tokens
    python examples/pangu_ultra/run.py               # all arms; resumes where it was stopped; writes results.md and results.png

Arms: norm placement (pre, sandwich with gamma 1, depth-scaled sandwich with measured c) x initialisation (normal, tiny) x learning rate
x seed. A run is `diverged` if a loss is not finite, or if the mean loss of any tenth of the run after the first exceeds the loss at step 1,
that of the untrained model; a step is a *spike* if its loss or gradient norm exceeds mean + 6 std of the last 32 steps that were none
(guards.spike), judged from step 17 on.
"""

import argparse
import contextlib
import itertools
import json
import multiprocessing
import os
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
PLACEMENTS = {"pre": "pre-norm", "sandwich": "sandwich (gamma 1)", "depth_scaled_sandwich": "depth-scaled sandwich"}
INITS = ("normal", "tiny")
RATES = (1e-3, 1e-2, 3e-2, 1e-1, 1.0, 10.0)
SEEDS = (1, 2, 3)


def name_of(placement: str, init: str, rate: float, seed: int) -> str:
    """A run's folder name."""
    return f"{placement}-{init}-lr{rate:g}-seed{seed}"


def train(job: tuple[str, str, float, int, str, int]) -> str:
    """Train one arm in this process, unless it is done; returns its name."""
    placement, init, rate, seed, output, steps = job
    name = name_of(placement, init, rate, seed)
    folder = Path(output) / name
    if (folder / "done").exists():
        return f"{name} (done before)"
    from llmtrain.config.load import load
    from llmtrain.stages.pretrain import run

    options = {
        "name": name,
        "output": output,
        "seed": seed,
        "device": "cpu",
        "optim.lr": rate,
        "train.steps": steps,
        "model.norm.placement": placement,
        "model.norm.c_attention": "auto",
        "model.norm.c_ffn": "auto",
        "model.init.kind": init,
        "checkpoint.resume": "none",
    }
    overrides = [f"--{key}={value}" for key, value in options.items()]
    with open(os.devnull, "w") as silent, contextlib.redirect_stdout(silent), contextlib.redirect_stderr(silent):
        code = run(load(HERE / "base.yaml", overrides).run)
    if code == 0:
        (folder / "done").touch()
    return f"{name}: exit code {code}"


def read(folder: Path) -> dict:
    """What one run gave: training losses, spikes, divergence, validation loss."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "train"]
    losses = [float(line["loss"]) for line in steps]
    tenth = max(1, len(losses) // 10)
    finite = all(loss == loss and abs(loss) < 1e9 for loss in losses)
    worse = max(sum(losses[at : at + tenth]) / tenth for at in range(tenth, len(losses), tenth)) > losses[0]
    validation = [float(line["loss"]) for line in lines if line["kind"] == "validation"]
    return {
        "losses": losses,
        "norms": [float(line["grad_norm"]) for line in steps],
        "spikes": sum(line["spike"] for line in steps),
        "judged": max(0, len(steps) - 16),
        "diverged": not finite or worse,
        "validation": validation[-1] if validation else float("nan"),
    }


def mean_std(values: list[float]) -> str:
    """`mean ± std` of finite values."""
    import numpy as np

    return f"{np.mean(values):.3f} ± {np.std(values):.3f}" if values else "-"


def table(runs: dict, rates: tuple) -> str:
    """Markdown: a row per arm and learning rate."""
    rows = ["| norm | init | lr | diverged | validation loss (the others) | spikes | spike ratio |", "|---|---|---|---|---|---|---|"]
    for placement, init, rate in itertools.product(PLACEMENTS, INITS, rates):
        arm = [runs[placement, init, rate, seed] for seed in SEEDS]
        good = [r["validation"] for r in arm if not r["diverged"]]
        spikes, judged = sum(r["spikes"] for r in arm), sum(r["judged"] for r in arm)
        diverged = sum(r["diverged"] for r in arm)
        rows.append(
            f"| {PLACEMENTS[placement]} | {init} | {rate:g} | {diverged}/{len(arm)} "
            f"| {mean_std(good)} | {spikes} | {spikes / max(1, judged):.2%} |"
        )
    return "\n".join(rows)


def summary(runs: dict, rates: tuple) -> str:
    """Markdown: per arm the best learning rate, its loss, the highest rate without divergence, and spikes over the whole sweep."""
    rows = [
        "| norm | init | best lr | validation loss there | highest lr without divergence | spikes in all runs |",
        "|---|---|---|---|---|---|",
    ]
    for placement, init in itertools.product(PLACEMENTS, INITS):
        arms = {rate: [runs[placement, init, rate, seed] for seed in SEEDS] for rate in rates}
        stable = [rate for rate in rates if not any(r["diverged"] for r in arms[rate])]
        losses = {rate: [r["validation"] for r in arms[rate]] for rate in stable}
        best = min(stable, key=lambda rate: sum(losses[rate])) if stable else None
        spikes, judged = (sum(r[key] for arm in arms.values() for r in arm) for key in ("spikes", "judged"))
        rows.append(
            f"| {PLACEMENTS[placement]} | {init} | {best} | {mean_std(losses.get(best, []))} | {max(stable, default='none')} "
            f"| {spikes} of {judged} steps ({spikes / max(1, judged):.2%}) |"
        )
    return "\n".join(rows)


def plot(runs: dict, rates: tuple, path: Path) -> None:
    """Validation loss and spikes over the sweep, and the loss curves at one learning rate."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(16, 4.6))
    shown = rates[len(rates) // 2]
    for (placement, init), color in zip(itertools.product(PLACEMENTS, INITS), plt.cm.tab10.colors):
        style = {"color": color, "ls": "--" if init == "tiny" else "-", "label": f"{PLACEMENTS[placement]}, {init}"}
        arms = [[runs[placement, init, rate, seed] for seed in SEEDS] for rate in rates]
        losses = [np.mean([r["validation"] if not r["diverged"] else np.nan for r in arm]) for arm in arms]
        left.plot(rates, losses, marker="o", **style)
        middle.plot(rates, [sum(r["spikes"] for r in arm) / sum(r["judged"] for r in arm) * 100 for arm in arms], marker="o", **style)
        for seed in SEEDS:
            curve = runs[placement, init, shown, seed]["losses"]
            right.plot(range(1, len(curve) + 1), curve, **(style if seed == SEEDS[0] else style | {"label": None}), lw=0.8, alpha=0.8)
    left.set(xscale="log", xlabel="peak learning rate", ylabel="validation loss (nats/token)", title="mean of seeds; gap: a seed diverged")
    middle.set(xscale="log", xlabel="peak learning rate", ylabel="spikes (% of judged steps)", title="spikes")
    right.set(xlabel="step", ylabel="training loss", title=f"training loss at lr {shown:g}, all seeds")
    left.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def write_results(output: Path, rates: tuple, steps: int) -> None:
    """results.md and results.png beside this file."""
    runs = {key: read(output / name_of(*key)) for key in itertools.product(PLACEMENTS, INITS, rates, SEEDS)}
    plot(runs, rates, HERE / "results.png")
    (HERE / "results.md").write_text(
        f"""# Results: 94 layers, {len(SEEDS)} seeds, {len(rates)} learning rates

`python examples/pangu_ultra/run.py --steps {steps}`, {time.strftime("%Y-%m-%d")}, 2 CPU cores; {len(runs)} runs of {steps} steps
of 8 x 64 tokens of the quickstart's plays, float32. 94 layers of width 32.

## By arm

{summary(runs, rates)}

## The whole sweep

{table(runs, rates)}

![sweep](results.png)
"""
    )


def main() -> None:
    """Run what is missing, then write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--output", default=str(ROOT / "runs/pangu_ultra"))
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--rates", type=float, nargs="+", default=list(RATES))
    args = parser.parse_args()
    os.chdir(ROOT)
    os.environ["OMP_NUM_THREADS"] = "1"
    jobs = [(p, i, r, s, args.output, args.steps) for s, r, p, i in itertools.product(SEEDS, args.rates, PLACEMENTS, INITS)]
    started = time.time()
    with multiprocessing.get_context("spawn").Pool(args.workers) as pool:
        for done, message in enumerate(pool.imap_unordered(train, jobs), 1):
            spent = time.time() - started
            print(f"{done}/{len(jobs)} {message}; {spent / 60:.1f} min, {spent / done * (len(jobs) - done) / 60:.0f} min to go", flush=True)
    write_results(Path(args.output), tuple(args.rates), args.steps)
    print(f"wrote {HERE / 'results.md'}")


if __name__ == "__main__":
    main()
