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
WINDOW = (0.2, 0.8)
"""CoT's accuracy on unseen instances outside of which the comparison says nothing."""


def write_results(folder: Path, found: dict, titles: dict[str, str]) -> None:
    """results.json and results.md."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(found, indent=1) + "\n")
    seeds = max(len(arm["runs"]) for arm in found.values())
    head = "| arm | inference | rate | steps | " + " | ".join(SETS.values()) + " | tokens | seconds |"
    lines = [f"# Results: {len(found)} arms, {seeds} seed{'s' * (seeds > 1)}", "", head, "|---|---|--:|--:|--:|--:|--:|--:|"]
    for arm, what in found.items():
        last = [run[-1] for run in what["runs"]]
        for how in last[0]["answers"]["unseen_instances"]:
            cells = [_spread([run["answers"][name][how]["accuracy"] for run in last]) for name in SETS]
            tokens, seconds = (fmean(run["answers"]["unseen_instances"][how][key] for run in last) for key in ("tokens", "seconds"))
            start = f"| {titles[arm]} | {how} | {what['rate']:g} | {last[0]['steps']:,}"
            lines.append(f"{start} | {' | '.join(cells)} | {tokens:.0f} | {seconds:.3f} |")
    error = max(run[-1]["answers"]["unseen_instances"]["plain"]["error"] for what in found.values() for run in what["runs"])
    lines += ["", f"Mean and standard deviation over seeds, percent. Standard error of one run's accuracy: at most {error:.1%}."]
    if "cot" in found:
        lines += ["", _window(fmean(run[-1]["answers"]["unseen_instances"]["plain"]["accuracy"] for run in found["cot"]["runs"]))]
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
