"""The loss plot of a report: a PNG through matplotlib, or a line of text."""

import math
from itertools import pairwise
from pathlib import Path
from statistics import median

from llmtrain.tools.history import History

BARS = "▁▂▃▄▅▆▇█"
TRAIN, SMOOTH, SPIKE, BIGRAM = "#b9cbe4", "#1f4e8c", "#c62828", "#777777"
VALIDATION = ("#e07b00", "#2e7d32", "#7b1fa2", "#00838f", "#ad1457", "#5d4037")


def draw(history: History, path: Path, *, title: str, baseline: float | None = None) -> None:
    """Write the plot to `path`: loss (with validation, spikes and the bigram `baseline` in nats/token), gradient norm, learning rate.

    Raises ImportError without matplotlib.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter

    figure = Figure(figsize=(9, 7.5), layout="constrained")
    loss, norm, rate = figure.subplots(3, 1, sharex=True, height_ratios=(3.2, 1.2, 1))
    _draw_loss(loss, history, baseline)
    norm.plot(*history.points("grad_norm"), color=SMOOTH, linewidth=0.9)
    norm.set(ylabel="gradient norm", yscale="log")
    norm.yaxis.set_major_formatter("{x:g}")
    norm.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1.5, 0.6)))
    _mark_spikes(norm, history, "grad_norm")
    rate.plot(*history.points("lr"), color=SMOOTH, linewidth=1.3)
    rate.set(ylabel="learning rate", xlabel="optimizer step", ylim=(0, None))
    rate.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    for axis in (loss, norm, rate):
        axis.grid(True, color="#e6e6e6", linewidth=0.7)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    loss.set_title(title, loc="left")
    figure.savefig(path, dpi=130)


def _draw_loss(axis, history: History, baseline: float | None) -> None:
    steps, losses = history.points("loss")
    smooth = smoothed(losses)
    axis.plot(steps, losses, color=TRAIN, linewidth=0.9, label="training")
    axis.plot(steps, smooth, color=SMOOTH, linewidth=1.8, label="training, running median")
    heights = [value for value in smooth if math.isfinite(value)]
    for color, (source, lines) in zip(VALIDATION * len(history.validation), history.sources().items()):
        values = [line["loss"] for line in lines]
        axis.plot(
            [line["step"] for line in lines], values, color=color, marker="o", markersize=5, linewidth=1, label=f"validation: {source}"
        )
        heights += [value for value in values if math.isfinite(value)]
    if baseline is not None:
        axis.axhline(baseline, color=BIGRAM, linestyle="--", linewidth=1.2, label=f"bigram model: {baseline:.3f}")
        heights.append(baseline)
    axis.set_ylabel("loss (nats/token)")
    if heights:
        room = 0.05 * (max(heights) - min(heights)) + 0.01
        axis.set_ylim(min(heights) - 2 * room, max(heights) + room)
    _mark_spikes(axis, history, "loss")
    axis.legend(frameon=False, fontsize=9)


def _mark_spikes(axis, history: History, column: str) -> None:
    steps, values = history.points(column)
    top = axis.get_ylim()[1]  # a spike beyond the axis is marked at its edge
    marked = [(s, min(v, top)) for s, v, line in zip(steps, values, history.train) if line.get("spike") and math.isfinite(v)]
    if marked:
        axis.plot(*zip(*marked), color=SPIKE, marker="v", markersize=6, linestyle="none", clip_on=False, label=f"spikes: {len(marked)}")


def smoothed(values: list[float], *, share: float = 0.02) -> list[float]:
    """Median of the neighbours within `share` of the values on each side: no lag, and no bump around a spike. Passes over NaN."""
    reach = max(2, round(share * len(values)))
    result = []
    for i in range(len(values)):
        side = min(reach, i, len(values) - 1 - i)  # as many on the left as on the right, or the ends would bend
        near = [value for value in values[i - side : i + side + 1] if math.isfinite(value)]
        result.append(median(near) if near else math.nan)
    return result


def sparkline(values: list[float], *, width: int = 60, low: float | None = None, high: float | None = None) -> str:
    """The values as one line of bars, averaged into at most `width` of them; values that are not finite are passed over.

    The lowest bar stands for `low`, the highest for `high`; for the least and the greatest of the means if not given.
    """
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return ""
    count = min(width, len(finite))
    edges = [round(i * len(finite) / count) for i in range(count + 1)]
    means = [math.fsum(finite[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means) if low is None else low, max(means) if high is None else high
    span = high - low
    return "".join(BARS[round((mean - low) / span * (len(BARS) - 1)) if span else 0] for mean in means)
