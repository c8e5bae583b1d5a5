"""MetaLadder's arms on templated word problems: accuracy, tokens and seconds per answer, beside the paper's ablation.

    python examples/metaladder/run.py            # says how much it is, runs what is missing, writes results.md and results.json
    python examples/metaladder/run.py --plan     # says how much it is
    python examples/metaladder/run.py --small    # seconds: the mechanics on a few problems; results in runs/metaladder_small

Every arm trains the same model on the same problems. Its learning rate is the one of RATES that answers most validation problems with the
first seed, whose test answers then count like those of the other seeds.
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
PROBLEMS, TEST, VALIDATION, SEEDS, RATES = 1000, 1000, 300, (1, 2, 3), (5e-4, 1.5e-3)
LARGEST = 30
"""Number in a problem: with 20, one template has too few instances for so many different problems."""
VOCABULARY = 600


class Arm(NamedTuple):
    """Options of one arm, and what it is asked with."""

    title: str
    options: dict
    inference: tuple[str, ...] = ("plain",)


ARMS = {
    "cot": Arm("CoT, equal epochs", {"variant": "cot"}),
    "cot_tokens": Arm("CoT, equal tokens", {"variant": "cot", "tokens_of": "metaladder"}),
    "analogyaug": Arm("AnalogyAug, equal tokens", {"variant": "analogyaug", "tokens_of": "metaladder"}),
    "no_analogy": Arm("type and restating alone", {"variant": "no_analogy"}),
    "metaladder": Arm("MetaLadder", {"variant": "metaladder"}, ("plain", "shortcut")),
    "reverse": Arm("MetaLadder + reverse", {"variant": "metaladder+reverse"}, ("plain", "shortcut")),
    "self_evolve": Arm("MetaLadder + self-evolve", {"variant": "metaladder", "rounds": 1}, ("plain", "shortcut")),
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
    """Run the stage unless it is done; the rounds' results."""
    from llmtrain import run

    done = Path(cfg.output) / cfg.name / "results.json"
    if not done.exists():
        result = run(cfg, stage="metaladder")
        if not result.done:
            raise SystemExit(f"{cfg.name} ended with exit code {int(result)}; started again, this goes on there")
    return json.loads(done.read_text())


def correct(rounds: list[dict]) -> float:
    """Accuracy on the validation problems after the last round."""
    return rounds[-1]["answers"]["validation"]["plain"]["accuracy"]


def plan(seeds, rates) -> str:
    """How much will be run."""
    runs = len(ARMS) * (len(rates) + len(seeds) - 1)
    return (
        f"{len(ARMS)} arms, {len(seeds)} seeds, {len(rates)} learning rates tried with the first: {runs} runs of {PROBLEMS:,} problems "
        f"(self-evolve: two rounds each), {TEST:,} test problems a set. Minutes per run: see README.md"
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

    name = f"metaladder{'_small' * args.small}"
    data, output = ROOT / "data" / name, (args.output or ROOT / "runs" / name).resolve()
    prepare(data, small=args.small)
    base = base_model(data, output, config=HERE / "sums.yaml", largest=LARGEST, options=SMALL if args.small else {})
    shared = {"data": data, "output": output, "base": base, "small": args.small, "overrides": overrides}
    found = {}
    for arm in args.arms:
        first = {rate: train(config(arm, rate=rate, seed=1, **shared)) for rate in rates}
        best = max(rates, key=lambda rate: correct(first[rate]))
        others = [train(config(arm, rate=best, seed=seed, **shared)) for seed in seeds if seed > 1]
        found[arm] = {"rate": best, "runs": [first[best], *others]}
        print(f"{ARMS[arm].title}: learning rate {best:g}", flush=True)
    from tables import write_results

    where = output if args.small or len(found) < len(ARMS) else HERE
    write_results(where, found, {arm: ARMS[arm].title for arm in found})
    if args.small:
        from mechanics import check

        check(data, output, config("metaladder", rate=rates[0], seed=1, **shared))
    print(f"wrote {where / 'results.md'}")


if __name__ == "__main__":
    main()
