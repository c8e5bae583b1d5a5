"""MetaLadder's arms on templated word problems: accuracy, tokens and seconds per answer, beside the paper's ablation.

    python examples/metaladder/run.py            # says how much it is, runs what is missing, writes results.md and results.json
    python examples/metaladder/run.py --plan     # says how much it is
    python examples/metaladder/run.py --small    # seconds: the mechanics on a few problems; results in runs/metaladder_small

Every arm trains the same model on the same problems, with the learning rate of RATES with which CoT (first seed) answers most validation
problems. Seed by seed, so that a stopped run has something to say: results.md is written after each.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(HERE))
PROBLEMS, TEST, VALIDATION, SEEDS, RATES = 1000, 500, 200, (1, 2, 3), (5e-4, 1.5e-3)
LARGEST = 30
"""Number in a problem: with 20, one template has too few instances for so many different problems."""
VOCABULARY = 600


class Arm(NamedTuple):
    """A run's options, what it is asked with, and the row of the results that each of its rounds is."""

    options: dict
    rows: tuple[str, ...]
    inference: tuple[str, ...] = ("plain",)


ARMS = {
    "cot": Arm({"variant": "cot"}, ("CoT, equal epochs",)),
    "metaladder": Arm({"variant": "metaladder", "rounds": 1}, ("MetaLadder", "MetaLadder + self-evolve"), ("plain", "shortcut")),
    "cot_tokens": Arm({"variant": "cot", "tokens_of": "metaladder"}, ("CoT, equal tokens",)),
    "reverse": Arm({"variant": "metaladder+reverse"}, ("MetaLadder + reverse",), ("plain", "shortcut")),
    "analogyaug": Arm({"variant": "analogyaug", "tokens_of": "metaladder"}, ("AnalogyAug, equal tokens",)),
    "no_analogy": Arm({"variant": "no_analogy"}, ("type and restating alone",)),
}
SMALL = {
    "model.layers": 1,
    "model.hidden": 32,
    "model.attention.heads": 2,
    "model.ffn.hidden": 48,
    "train.steps": 2,
    "train.compile": "off",
    "metaladder.max_new": 24,
    "metrics.sample_tokens": 4,
}


def prepare(folder: Path, *, small: bool) -> None:
    """Problems, then a vocabulary of their texts, unless they are there."""
    from llmtrain.data.metaladder.build import rungs_of
    from llmtrain.data.metaladder.render import examples
    from llmtrain.tools import data

    sizes = {
        "--largest": LARGEST,
        "--problems": 24 if small else PROBLEMS,
        "--test": 8 if small else TEST,
        "--validation": 8 if small else VALIDATION,
    }
    if not (folder / "sizes.json").exists():
        words = [str(word) for pair in sizes.items() for word in pair]
        data.main(["metaladder", "--out", str(folder), *words])
    if not (folder / "tokenizer.model").exists():
        lines = examples(rungs_of(folder), "metaladder")
        (folder / "texts.txt").write_text("\n\n".join(line["prompt"] + line["response"] for line in lines), encoding="utf-8")
        size = str(360 if small else VOCABULARY)
        data.main(["tokenizer", "--input", str(folder / "texts.txt"), "--vocab-size", size, "--out", str(folder / "tokenizer.model")])


def config(arm: str, *, rate: float, seed: int, data: Path, output: Path, base: Path, small: bool, overrides: list[str]):
    """The stage's configuration of one run."""
    from llmtrain.config.run import RunConfig
    from llmtrain.config.yamlfile import inline

    options = {f"metaladder.{name}": value for name, value in ARMS[arm].options.items()}
    options |= {"metaladder.inference": list(ARMS[arm].inference), "metaladder.data": str(data)}
    options |= {"tokenizer.path": str(data / "tokenizer.model"), "model.pretrained": str(base)}
    options |= {"name": f"{arm}-rate{rate:g}-seed{seed}", "output": str(output), "seed": seed, "optim.lr": rate} | (SMALL if small else {})
    return RunConfig.load(HERE / "base.yaml", [*(f"--{name}={inline(value)}" for name, value in options.items()), *overrides])


def train(cfg) -> list[dict]:
    """Run the stage unless it is done; the rounds' results, with what solutions of unseen instances get right of their sums."""
    from solution_sums import shares

    from llmtrain import run

    done = Path(cfg.output) / cfg.name / "results.json"
    if not done.exists():
        result = run(cfg, stage="metaladder")
        if not result.done:
            raise SystemExit(f"{cfg.name} ended with exit code {int(result)}; started again, this goes on there")
    rounds, asked = json.loads(done.read_text()), Path(cfg.metaladder.data) / "unseen_instances.jsonl"
    for one in rounds:
        for how, scores in one["answers"]["unseen_instances"].items():
            answers = done.parent / "answers" / f"round-{one['round']}-unseen_instances-{how}.json"
            scores["begun"], scores["true"] = shares(answers, asked)
    return rounds


def chosen(rates: tuple[float, ...], **shared) -> float:
    """The learning rate with which CoT answers most validation problems."""
    if len(rates) == 1:
        return rates[0]
    rounds = {rate: train(config("cot", rate=rate, seed=1, **shared))[-1] for rate in rates}
    return max(rates, key=lambda rate: rounds[rate]["answers"]["validation"]["plain"]["accuracy"])


def plan(seeds, rates) -> str:
    """How much will be run."""
    runs = len(ARMS) * len(seeds) + len(rates) - 1
    return (
        f"{len(ARMS)} arms, {len(seeds)} seeds, {len(rates)} learning rates tried with CoT: {runs} runs of {PROBLEMS:,} problems "
        f"(MetaLadder: two rounds each, the second being self-evolve), {TEST:,} test problems a set. Minutes per run: see README.md"
    )


def main() -> None:
    """Run what is missing, then write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="the mechanics on a few problems")
    parser.add_argument("--plan", action="store_true", help="say how much it is, and end")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS), help="only these (all)")
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="how many (3)")
    parser.add_argument("--output", type=Path, help="of the runs (runs/metaladder)")
    args, overrides = parser.parse_known_args()
    os.chdir(ROOT)
    seeds, rates = (range(1, args.seeds + 1), RATES) if not args.small else ((1,), RATES[:1])
    print(plan(seeds, rates), flush=True)
    if args.plan:
        return
    from sums import base_model
    from tables import write_results

    name = f"metaladder{'_small' * args.small}"
    data, output = ROOT / "data" / name, (args.output or ROOT / "runs" / name).resolve()
    prepare(data, small=args.small)
    base = base_model(data, output, config=HERE / "sums.yaml", largest=LARGEST, options=SMALL if args.small else {})
    shared = {"data": data, "output": output, "base": base, "small": args.small, "overrides": overrides}
    rate = chosen(rates, **shared)
    where = output if args.small or len(args.arms) < len(ARMS) else HERE
    found: dict[str, list[dict]] = {}
    for seed in seeds:
        for arm in args.arms:
            rounds = train(config(arm, rate=rate, seed=seed, **shared))
            for row, result in zip(ARMS[arm].rows, rounds, strict=True):
                found.setdefault(row, []).append(result)
        write_results(where, found, rate=rate)
    if args.small:
        from mechanics import check

        check(data, output, config("metaladder", rate=rate, seed=1, **shared))
    print(f"wrote {where / 'results.md'}")


if __name__ == "__main__":
    main()
