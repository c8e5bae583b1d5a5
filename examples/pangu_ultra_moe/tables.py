"""results.md: tables over arms and seeds."""

import platform
import time
from pathlib import Path

import numpy as np
import routes
from plots import plot

from llmtrain.tools.history import History

LAST = 0.1
"""Share of the steps, the last ones, whose loads are averaged."""
REFERENCE = "ep_group"
SHOWN = ("micro_batch", "ep_group", "step")
"""Arms whose experts are shown one by one."""
MEASURES = {
    "loss": ("validation loss, mean of domains", ".4f"),
    "load": ("max/mean load", ".3f"),
    "specialisation": ("specialisation", ".4f"),
    "departure": ("co-activation", ".4f"),
}


def read(folder: Path) -> dict:
    """One run: validation losses by domain, load, entropy and dropped share [steps,L], routing counts, and the mean of each measure."""
    history, found = History.read(folder), routes.measure(folder)
    losses = {source: lines[-1]["loss"] for source, lines in history.sources().items()}
    use = {
        name: np.array([line["experts"].get(name, [0.0] * len(line["experts"]["load"])) for line in history.train])
        for name in ("load", "entropy", "dropped")
    }
    pairs = np.array(found["pairs"])
    run = {"losses": losses, **use, "counts": np.array(found["counts"]), "pairs": pairs.sum(0)}
    run["specialisation"] = routes.specialisation(run["counts"])
    run["departure"] = np.array([routes.departure(layer) for layer in run["pairs"]])
    run["within"] = np.array([np.mean([routes.departure(domain[layer]) for domain in pairs]) for layer in range(pairs.shape[1])])
    run["settings"] = {"steps": history.steps, "tokens": history.train[-1]["tokens"]}
    return run


def last(values: np.ndarray) -> np.ndarray:
    """Mean over the last steps, [steps,L] -> [L]."""
    return values[-max(1, round(LAST * len(values))) :].mean(0)


def measures(run: dict) -> dict[str, float]:
    """One number per measure."""
    return {
        "loss": float(np.mean(list(run["losses"].values()))),
        "load": float(last(run["load"]).mean()),
        "specialisation": float(run["specialisation"].mean()),
        "departure": float(run["departure"].mean()),
    }


def spread(values: list[float], form: str = ".3f") -> str:
    """`mean ± std` over seeds."""
    return f"{np.mean(values):{form}} ± {np.std(values):{form}}"


def by_layer(values: list[np.ndarray], form: str) -> str:
    """Mean over seeds of each layer, first to last."""
    return ", ".join(f"{value:{form}}" for value in np.mean(values, 0))


def rows(head: list[str], lines: list[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *lines])


def loss_table(runs: dict, titles: dict) -> str:
    """Validation losses by domain."""
    domains = list(next(iter(runs.values()))[0]["losses"])
    lines = [
        [titles[arm], *(spread([run["losses"][d] for run in seeds]) for d in domains), spread([measures(run)["loss"] for run in seeds])]
        for arm, seeds in runs.items()
    ]
    return rows(["arm", *domains, "mean of domains"], lines)


def balance_table(runs: dict, titles: dict) -> str:
    """Loads in the last steps by layer."""
    lines = []
    for arm, seeds in runs.items():
        values = [spread([last(run["load"]).mean() for run in seeds], ".2f"), by_layer([last(run["load"]) for run in seeds], ".2f")]
        values += [by_layer([last(run["entropy"]) for run in seeds], ".3f")]
        dropped = any(run["dropped"].any() for run in seeds)
        values += (
            [
                spread([last(run["dropped"]).mean() * 100 for run in seeds], ".1f"),
                by_layer([last(run["dropped"]) * 100 for run in seeds], ".1f"),
            ]
            if dropped
            else ["0", ""]
        )
        lines.append([titles[arm], *values])
    return rows(["arm", "max/mean load", "by layer", "entropy by layer", "dropped choices (%)", "by layer"], lines)


def routing_table(runs: dict, titles: dict) -> str:
    """Specialisation and co-activation by layer."""
    lines = []
    for arm, seeds in runs.items():
        line = [titles[arm]]
        for name in ("specialisation", "departure", "within"):
            line += [spread([run[name].mean() for run in seeds]), *([by_layer([run[name] for run in seeds], ".3f")] * (name != "within"))]
        lines.append(line)
    return rows(["arm", "specialisation", "by layer", "co-activation", "by layer", "within a domain"], lines)


def claim(mine: list[float], reference: list[float], form: str) -> str:
    """The difference of means, and whether every seed of one arm is beyond every seed of the other."""
    difference = f"{np.mean(mine) - np.mean(reference):+{form}}"
    if len(mine) < 2:
        return f"{difference}, one seed: no claim"
    if min(mine) > max(reference):
        return f"**{difference}**, higher in every seed"
    return f"**{difference}**, lower in every seed" if max(mine) < min(reference) else f"{difference}, no claim"


def claims_table(runs: dict, titles: dict) -> str:
    """Every arm against the EP-group loss."""
    found = {arm: [measures(run) for run in seeds] for arm, seeds in runs.items()}
    lines = [
        [titles[arm], *(claim([m[name] for m in mine], [m[name] for m in found[REFERENCE]], form) for name, (_, form) in MEASURES.items())]
        for arm, mine in found.items()
        if arm != REFERENCE
    ]
    return rows(["arm", *(title for title, _ in MEASURES.values())], lines)


def domain_table(runs: dict, titles: dict) -> str:
    """Of the last layer's experts the share of each domain's choices, in percent, first seed."""
    domains = list(next(iter(runs.values()))[0]["losses"])
    shown = [arm for arm in SHOWN if arm in runs]
    share = {arm: routes.shares(runs[arm][0]["counts"])[:, -1] * 100 for arm in shown}  # [D,E]
    lines = [[str(e), *(f"{share[arm][d, e]:.1f}" for arm in shown for d in range(len(domains)))] for e in range(share[shown[0]].shape[1])]
    return rows(["expert", *(f"{titles[arm].split(' (')[0]}: {d}" for arm in shown for d in domains)], lines)


def pair_table(runs: dict) -> str:
    """Of the last layer with the EP-group loss, first seed: how much more often than independently two experts are chosen together."""
    lift = routes.lift(runs[REFERENCE][0]["pairs"][-1])
    lines = [[str(i), *("" if i == j else f"{value:.1f}" for j, value in enumerate(row))] for i, row in enumerate(lift)]
    return rows(["expert", *map(str, range(len(lift)))], lines)


def write_results(where: Path, folders: dict[str, list[Path]], *, titles: dict[str, str]) -> None:
    """results.md and results.png in `where`, of the runs in `folders`, by arm and the same seeds in each."""
    runs = {arm: [read(folder) for folder in seeds] for arm, seeds in folders.items()}
    first = next(iter(runs.values()))
    plot(runs, titles, where / "results.png", shown=REFERENCE)
    settings = first[0]["settings"]
    made = f"{time.strftime('%Y-%m-%d')}, CPU, float32, Python {platform.python_version()}"
    (where / "results.md").write_text(
        f"""# Results: {len(runs)} arms, {len(first)} seed{"s" * (len(first) > 1)}

`python examples/pangu_ultra_moe/run.py`, {made}; {settings["steps"]} steps,
{settings["tokens"]:,} tokens a run. Means ± standard deviations over seeds; layers are those with experts, first to last. Load, entropy
and dropped choices are means over the last {LAST:.0%} of the steps.

## Validation loss (nats per token)

{loss_table(runs, titles)}

## Balance

{balance_table(runs, titles)}

## Specialisation and co-activation (validation)

Specialisation: mutual information between domain and expert, over the domains' entropy; 0 is none, 1 is experts that each serve one
domain. Co-activation: the share of pairs of experts that would have to be others for the experts of a token to be independent; 0 is
none. Within a domain: the same of each domain's tokens alone, the mean.

{routing_table(runs, titles)}

## Against the EP-group loss

Differences of means. Where the ranges over seeds overlap there is no claim.

{claims_table(runs, titles)}

## Experts by domain

Share of a domain's choices in percent (even: {100 / first[0]["counts"].shape[-1]:.2f}), last layer, first seed.

{domain_table(runs, titles)}

## Experts chosen together

Pairs of experts over what independent choices with the same loads would give; EP-group loss, last layer, first seed.

{pair_table(runs)}

![loads, specialisation, domains, pairs](results.png)
"""
    )
