"""The example's results as tables."""

import json
from pathlib import Path
from statistics import fmean, stdev

SETS = {"unseen_instances": "unseen instances", "unseen_templates": "unseen templates"}
PAPER = """| | GSM8K | MATH | | GSM8K | MATH |
|---|--:|--:|---|--:|--:|
| CoT | 61.5 | 19.4 | MetaLadder | 66.2 | 22.4 |
| AnalogyAug | 63.8 | 22.6 | with the shortcut | 69.4 | 24.0 |
| no strategy | 64.9 | 22.2 | + reverse | 71.5 | 25.6 |
| no analogy | 64.7 | 21.0 | + self-evolve | 66.5 | 24.8 |
| no restating | 61.6 | 22.0 | + self-evolve, shortcut | 73.5 | 26.0 |"""
CONTROL = "CoT, equal epochs"
WINDOW = (0.2, 0.8)
"""CoT's accuracy on unseen instances outside of which the comparison says nothing."""


def write_results(folder: Path, found: dict[str, list[dict]], *, rate: float) -> None:
    """results.json and results.md; `found` has by row what each seed's round gave."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps({"rate": rate, "rows": found}, indent=1) + "\n")
    seeds = max(map(len, found.values()))
    head = "| trained as | inference | steps | " + " | ".join(SETS.values()) + " | first sum | sums true | tokens | seconds |"
    title = f"# Results: {seeds} seed{'s' * (seeds > 1)}, learning rate {rate:g}"
    lines = [title, "", head, "|---|---|--:|--:|--:|--:|--:|--:|--:|"]
    for row, runs in found.items():
        for how in runs[0]["answers"]["unseen_instances"]:
            cells = [_spread([run["answers"][name][how]["accuracy"] for run in runs]) for name in SETS]
            each = [run["answers"]["unseen_instances"][how] for run in runs]
            cells += [_spread([one[key] for one in each]) for key in ("begun", "true")]
            tokens, seconds = fmean(one["tokens"] for one in each), min(one["seconds"] for one in each)
            lines.append(
                f"| {row} | {how} | {fmean(run['steps'] for run in runs):,.0f} | {' | '.join(cells)} | {tokens:.0f} | {seconds:.3f} |"
            )
    error = max(run["answers"]["unseen_instances"]["plain"]["error"] for runs in found.values() for run in runs)
    lines += ["", f"Mean and standard deviation over seeds, percent. Standard error of one run's accuracy: at most {error:.1%}."]
    lines[-1] += " Seconds per answer are the least of a seed."
    lines += [
        "",
        "First sum, sums true: shares of the solutions of unseen instances that begin with the sum wanted, and that have no false sum.",
    ]
    if CONTROL in found:
        lines += ["", _window(fmean(run["answers"]["unseen_instances"]["plain"]["accuracy"] for run in found[CONTROL]))]
    lines += ["", "The paper, Llama3-8B on 15K problems of GSM8K and MATH (arXiv 2503.14891):", "", PAPER, ""]
    (folder / "results.md").write_text("\n".join(lines))


def _spread(values: list[float]) -> str:
    return f"{100 * fmean(values):.1f}" + (f" ± {100 * stdev(values):.1f}" if len(values) > 1 else "")


def _window(accuracy: float) -> str:
    low, high = WINDOW
    if low <= accuracy <= high:
        return f"CoT answers {accuracy:.0%} of the unseen instances, within {low:.0%} to {high:.0%}."
    void = f"outside {low:.0%} to {high:.0%}: the comparison is void"
    return f"**CoT answers {accuracy:.0%} of the unseen instances, {void}.** Change `epochs`."
