"""Pangu Ultra MoE's balance losses, and dropless against drop-and-pad, on three domains of text.

    python examples/pangu_ultra_moe/run.py           # all arms; resumes where it was stopped; writes results.md and results.png
    python examples/pangu_ultra_moe/run.py --quick   # 40 steps, one seed: minutes; results in runs/pangu_ultra_moe_quick

An arm is a scope of the balance loss (none, micro-batch, EP group, step), a router bias without a loss, or a capacity on top of the
EP-group loss; arms differ in nothing else. Every run is one process: groups are given in sequences, so it computes what a mesh would.
"""

import argparse
import contextlib
import multiprocessing
import os
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(HERE))
MICRO_BATCH, EP_GROUP = 2, 8
"""Sequences of what would be a rank's micro-batch, and of an EP group of 4 such ranks."""
WEIGHT = 0.01
LOSS = "--model.ffn.balance.weight", str(WEIGHT), "--model.ffn.balance.sequences"
DROPPING = "--model.ffn.capacity.sequences", str(MICRO_BATCH), "--model.ffn.capacity.factor"
ARMS = {
    "none": ("no balance loss", ()),
    "micro_batch": (f"micro-batch loss ({MICRO_BATCH} sequences)", (*LOSS, str(MICRO_BATCH))),
    "ep_group": (f"EP-group loss ({EP_GROUP} sequences)", (*LOSS, str(EP_GROUP))),
    "step": ("global loss (step)", (*LOSS, "step")),
    "bias": ("router bias alone", ("--model.ffn.router.bias_rate", "0.01")),
    "drop_1.25": ("EP-group loss, capacity 1.25", (*LOSS, str(EP_GROUP), *DROPPING, "1.25")),
    "drop_1.0": ("EP-group loss, capacity 1.0", (*LOSS, str(EP_GROUP), *DROPPING, "1.0")),
}
SEEDS = (1, 2, 3)
QUICK = ("--train.steps", "40", "--train.validate_samples", "32", "--checkpoint.every", "0")


def folder_of(output: Path, arm: str, seed: int) -> Path:
    """A run's folder."""
    return output / f"{arm}-seed{seed}"


def train(job: tuple[str, int, str, tuple[str, ...]]) -> str:
    """Train one arm in this process and measure its routing, unless that is done, from the last checkpoint on; says what it did."""
    arm, seed, output, overrides = job
    folder = folder_of(Path(output), arm, seed)
    if (folder / "done").exists():
        return f"{folder.name} (done before)"
    from routes import measure

    from llmtrain.config.load import load
    from llmtrain.stages.pretrain import run

    words = ["--name", folder.name, "--output", output, "--seed", str(seed), "--device", "cpu", *ARMS[arm][1], *overrides]
    with open(os.devnull, "w") as silent, contextlib.redirect_stdout(silent), contextlib.redirect_stderr(silent):
        code = run(load(HERE / "base.yaml", words).run)
        if code == 0:
            measure(folder)
            (folder / "done").touch()
    return f"{folder.name}: exit code {code}"


def main() -> None:
    """Run what is missing, then write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="40 steps of one seed")
    parser.add_argument("--steps", type=int, help="of every run (200)")
    parser.add_argument("--output", type=Path, help="of the runs (runs/pangu_ultra_moe)")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, one thread each (2)")
    parser.add_argument(
        "--only-results", action="store_true", help="train nothing; write the results of the seeds of which all arms are done"
    )
    args = parser.parse_args()
    os.chdir(ROOT)
    os.environ["OMP_NUM_THREADS"] = "1"
    from domains import prepare
    from tables import write_results

    output = (args.output or ROOT / f"runs/pangu_ultra_moe{'_quick' * args.quick}").resolve()
    seeds = SEEDS[:1] if args.quick else SEEDS
    overrides = (*(QUICK if args.quick else ()), *(("--train.steps", str(args.steps)) if args.steps else ()))
    if not args.only_results:
        prepare(Path("data/pangu_ultra_moe"))
        work([(arm, seed, str(output), overrides) for seed in seeds for arm in ARMS], args.workers)
    done = [seed for seed in seeds if all((folder_of(output, arm, seed) / "done").exists() for arm in ARMS)]
    if not done:
        raise SystemExit(f"no seed in {output} has all its arms done")
    where = output if args.quick else HERE
    write_results(
        where, {arm: [folder_of(output, arm, seed) for seed in done] for arm in ARMS}, titles={a: t for a, (t, _) in ARMS.items()}
    )
    print(f"wrote {where / 'results.md'}")


def work(jobs: list[tuple], workers: int) -> None:
    """All jobs, `workers` at a time."""
    started = time.time()
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        for done, message in enumerate(pool.imap_unordered(train, jobs), 1):
            spent = time.time() - started
            print(f"{done}/{len(jobs)} {message}; {spent / 60:.1f} min, {spent / done * (len(jobs) - done) / 60:.0f} min to go", flush=True)


if __name__ == "__main__":
    main()
