"""What a sweep of `llmtrain gap` shows: gains on a held-out half, the paper's protocol beside them, the whole distribution."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llmtrain.errors import UserError
from llmtrain.stages.gap_results import FILE, lower_is_better, read
from llmtrain.tools.paired import Difference, bootstrap, bootstrap_between

NOTES = """
A gain is the score of the treated model minus that of the untreated one on the same items, its sign turned for nats per token, so that
more is better. *Held out*: the step (0 among them) is chosen on every other item, the selection half, and the gain is that on the rest.
+/- is the standard deviation of a bootstrap over runs and items, 95% its middle; *detectable* is the true gain that so many runs and
items find 4 times of 5 at the level of 5%. *Paper's protocol*: the best step of each run on the very items that are reported, the
untreated model being one of the candidates; it cannot be negative.
"""


class Gains(NamedTuple):
    """One evaluation of the runs on one source's texts."""

    held_out: np.ndarray
    """[runs, items of the held-out half] gain at the step that the selection half chose."""
    chosen: np.ndarray
    """[runs] that step."""
    paper: np.ndarray
    """[runs] gain of the best step on all items."""
    fixed: dict[int, np.ndarray]
    """step -> [runs that reached it, items] gain."""


def selection(items: int) -> np.ndarray:
    """Which items choose; the others are held out."""
    return np.arange(items) % 2 == 0


def best_step(name: str, base: Sequence[float], run: dict) -> tuple[int, float]:
    """The step of a run, 0 among them, with the best mean on the selection half, the earliest of equals, and its gain there."""
    half = selection(len(base))
    gains = {0: 0.0} | {int(step): float(_gain(name, base, scores[name])[half].mean()) for step, scores in run["steps"].items()}
    step = max(gains, key=lambda step: (gains[step], -step))
    return step, gains[step]


def best_run(base: Sequence[float], runs: Sequence[dict], name: str) -> tuple[str | None, int]:
    """(text's key, step) of the best on the selection half; (None, 0) if that is the untreated model."""
    found = [(*best_step(name, base, run), run["key"]) for run in runs]
    step, gain, key = max(found, key=lambda entry: entry[1], default=(0, 0.0, None))
    return (key, step) if gain > 0 else (None, 0)


def _gain(name: str, base: Sequence[float], treated: Sequence[float]) -> np.ndarray:
    difference = np.array(treated, dtype=float) - np.array(base, dtype=float)
    return -difference if lower_is_better(name) else difference


def gains(name: str, base: Sequence[float], runs: Sequence[dict]) -> Gains:
    """The gains of `runs` in the evaluation `name`."""
    held = ~selection(len(base))
    steps = [best_step(name, base, run)[0] for run in runs]
    of = [{0: np.zeros(len(base))} | {int(step): _gain(name, base, s[name]) for step, s in run["steps"].items()} for run in runs]
    return Gains(
        held_out=np.array([found[step][held] for found, step in zip(of, steps)]),
        chosen=np.array(steps),
        paper=np.array([max(values.mean() for values in found.values()) for found in of]),
        fixed={
            step: np.array([found[step] for found in of if step in found])
            for step in sorted({step for found in of for step in found if step})
        },
    )


def load(folder: Path) -> tuple[dict[str, list[float]], list[dict]]:
    """The untreated model's scores and the runs. Raises UserError if there are none yet."""
    path = folder / FILE
    lines = read(path)
    base = next((line["scores"] for line in lines if line["kind"] == "base"), None)
    runs = [line for line in lines if line["kind"] == "run"]
    if base is None or not runs:
        raise UserError(f"{path}: holds no finished run yet")
    return base, runs


def write(folder: Path, *, control: str | None = None) -> str:
    """Write report.md, and gap.png if matplotlib is installed, into the sweep's folder; returns the report's text."""
    base, runs = load(folder)
    text = report(base, runs, control=control)
    if plot(base, runs, folder / "gap.png"):
        text += "\n![Gains of all runs by step](gap.png)\n"
    (folder / "report.md").write_text(text, encoding="utf-8")
    return text


def by_source(runs: Sequence[dict]) -> dict[str, list[dict]]:
    """Runs by the source of their text, in order."""
    return {name: [run for run in runs if run["source"] == name] for name in dict.fromkeys(run["source"] for run in runs)}


def report(base: dict[str, list[float]], runs: Sequence[dict], *, control: str | None = None) -> str:
    """The tables in Markdown."""
    sources = by_source(runs)
    parts = ["# Gradient Ascent Post-training", _ended(sources), NOTES.strip()]
    for name, scores in base.items():
        found = {source: gains(name, scores, some) for source, some in sources.items()}
        parts += [f"## {name}", _head(name, scores), _held_out_table(found), _fixed_table(found)]
        if control in found and len(found) > 1:
            parts.append(_against(found, control))
    return "\n\n".join(parts) + "\n"


def _ended(sources: dict[str, list[dict]]) -> str:
    lines = [
        "| texts | runs | to the end | diverged | stopped early | cross-entropy before | at the last step |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for source, runs in sources.items():
        kinds = [run["ended"].split(":")[0] for run in runs]
        counts = " | ".join(str(kinds.count(kind)) for kind in ("done", "diverged", "early"))
        first, last = (np.median([float(run["losses"][at]) for run in runs if run["losses"]] or [np.nan]) for at in (0, -1))
        lines.append(f"| {source} | {len(runs)} | {counts} | {first:.3f} | {last:.3f} |")
    return "\n".join(lines) + "\n\nCross-entropies are medians over the runs, in nats per token of the text ascended on."


def _head(name: str, scores: Sequence[float]) -> str:
    half, values = selection(len(scores)), np.array(scores, dtype=float)
    more = f"; perplexity {np.exp(values.mean()):.2f}" if lower_is_better(name) else ""
    halves = f"{values[half].mean():.3f} on the selection half, {values[~half].mean():.3f} on the held-out half" if len(scores) > 1 else ""
    return f"Untreated: {values.mean():.3f} over {len(scores)} items ({halves}){more}."


def _held_out_table(found: dict[str, Gains]) -> str:
    lines = [
        "| texts | runs | steps chosen (median) | gain, held out | +/- | 95% | detectable | runs above 0 | paper's protocol: mean, best |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for source, g in found.items():
        if not g.held_out.shape[1]:
            continue
        means, paper = g.held_out.mean(axis=1), f"{g.paper.mean():+.3f}, {g.paper.max():+.3f}"
        share = f"{(means > 0).mean():.0%}"
        lines.append(f"| {source} | {len(means)} | {np.median(g.chosen):g} | {_figures(bootstrap(g.held_out))} | {share} | {paper} |")
    return "\n".join(lines)


def _fixed_table(found: dict[str, Gains]) -> str:
    lines = ["| texts | step, fixed in advance | runs | gain, all items | +/- | 95% | detectable |", "|---|--:|--:|--:|--:|--:|--:|"]
    for source, g in found.items():
        lines += [f"| {source} | {step} | {len(values)} | {_figures(bootstrap(values))} |" for step, values in g.fixed.items()]
    return "\n".join(lines)


def _against(found: dict[str, Gains], control: str) -> str:
    lines = [f"| texts, less {control} | difference of the gains, held out | +/- | 95% | detectable |", "|---|--:|--:|--:|--:|"]
    for source, g in found.items():
        if source != control:
            lines.append(f"| {source} | {_figures(bootstrap_between(g.held_out, found[control].held_out))} |")
    return "\n".join(lines)


def _figures(d: Difference) -> str:
    return f"{d.mean:+.3f} | {d.error:.3f} | {d.low:+.3f} to {d.high:+.3f} | {d.detectable:.3f}"


def plot(base: dict[str, list[float]], runs: Sequence[dict], path: Path) -> bool:
    """Every run's gain at every step it was measured at, a column of axes per evaluation; False without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    sources = by_source(runs)
    figure = Figure(figsize=(4.2 * len(base), 3.8), layout="constrained")
    for axes, (name, scores) in zip(figure.subplots(1, len(base), squeeze=False)[0], base.items()):
        for place, (source, some) in enumerate(sources.items()):
            _points(axes, gains(name, scores, some), label=source, place=place, of=len(sources))
        axes.axhline(0, color="grey", linewidth=0.8)
        axes.set(title=name, xlabel="steps of ascent", ylabel="gain over the untreated model")
        axes.legend()
    figure.savefig(path, dpi=120)
    return True


def _points(axes, g: Gains, *, label: str, place: int, of: int) -> None:
    """A dot per run beside its step, the mean as a bar."""
    for number, (step, values) in enumerate(g.fixed.items()):
        means, x = values.mean(axis=1), step + 3.0 * ((place + 0.5) / of - 0.5)
        axes.scatter(np.full(len(means), x), means, s=10, alpha=0.5, color=f"C{place}", label=label if number == 0 else None)
        axes.plot([x - 0.3, x + 0.3], [means.mean()] * 2, color=f"C{place}", linewidth=2)
