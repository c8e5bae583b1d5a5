"""results.png: balance over training, specialisation by layer, experts by domain and by pair."""

from pathlib import Path

import matplotlib
import numpy as np
import routes

matplotlib.use("Agg")
import matplotlib.pyplot as plt

WINDOW = 10
"""Steps over which curves are averaged."""


def smooth(values: np.ndarray) -> np.ndarray:
    """A running mean, [steps] -> [steps - window + 1]."""
    window = min(WINDOW, len(values))
    return np.convolve(values, np.ones(window) / window, mode="valid")


def curves(axes: plt.Axes, runs: dict, titles: dict, name: str) -> None:
    """A line per arm: the mean over seeds and layers."""
    for color, (arm, seeds) in zip(plt.cm.tab10.colors, runs.items()):
        values = smooth(np.mean([run[name].mean(1) for run in seeds], 0))
        if name != "dropped" or values.any():
            axes.plot(np.arange(len(values)) + min(WINDOW, len(seeds[0][name])), values, color=color, label=titles[arm], lw=1)
    axes.set(xlabel="step")


def heat(figure: plt.Figure, axes: plt.Axes, values: np.ndarray, **labels) -> None:
    """A matrix as colours."""
    figure.colorbar(axes.imshow(values, aspect="auto", cmap="viridis"), ax=axes)
    axes.set(**labels)


def plot(runs: dict, titles: dict, path: Path, *, shown: str) -> None:
    """All panels; the two matrices are those of the arm `shown`, first seed, last layer."""
    figure, axes = plt.subplots(2, 3, figsize=(17, 9))
    for panel, name, title in zip(axes.flat, ("load", "entropy", "dropped"), ("max/mean load", "entropy of the load", "dropped share")):
        curves(panel, runs, titles, name)
        panel.set(title=f"{title} (mean of layers and seeds)")
    axes[0, 0].legend(fontsize=8)
    for offset, (color, (arm, seeds)) in enumerate(zip(plt.cm.tab10.colors, runs.items())):
        values = np.array([run["specialisation"] for run in seeds])
        places = np.arange(values.shape[1]) + offset * 0.8 / len(runs)
        axes[1, 0].bar(places, values.mean(0), 0.8 / len(runs), yerr=values.std(0), color=color, label=titles[arm])
    axes[1, 0].set(xlabel="layer with experts", title="specialisation (bars: std over seeds)", xticks=range(values.shape[1]))
    run = runs[shown][0]
    share, domains = routes.shares(run["counts"])[:, -1] * 100, list(run["losses"])
    where = {"xlabel": "expert", "yticks": range(len(domains)), "yticklabels": domains}
    heat(figure, axes[1, 1], share, title=f"% of a domain's choices: {titles[shown]}", **where)
    pairs = routes.lift(run["pairs"][-1])
    heat(figure, axes[1, 2], np.minimum(pairs, 4), title="chosen together, over independence", xlabel="expert", ylabel="expert")
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)
