"""The heat map of a report's mixtures of experts, through matplotlib."""

import math
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llmtrain.tools.report_experts import ExpertHistory

COLUMNS = 400
"""Columns of the map at most; of more steps, neighbours are averaged."""
REACH = 3
"""Shares are shown from 2^-3 to 2^3 times the even one."""


def draw_experts(found: "ExpertHistory", path: Path) -> None:
    """Write to `path`: the load of every layer over the steps, and each layer's experts' shares at the end, where they are known.

    Raises ImportError without matplotlib.
    """
    from matplotlib.figure import Figure

    height = min(7.0, 1.6 + 0.16 * found.layers)
    figure = Figure(figsize=(9, height * (2 if found.shares else 1)), layout="constrained")
    axes = figure.subplots(2 if found.shares else 1, 1, squeeze=False)[:, 0]
    _draw_load(figure, axes[0], found)
    if found.shares:
        _draw_shares(figure, axes[1], found)
    for axis in axes:
        axis.yaxis.get_major_locator().set_params(integer=True)
        axis.spines[:].set_visible(False)
    figure.savefig(path, dpi=130)


def _draw_load(figure, axis, found: "ExpertHistory") -> None:
    from matplotlib.colors import LogNorm

    edges, columns = binned(found.steps, found.columns["load"])
    top = max(2.0, *(max(column) for column in columns))
    rows = [[column[layer] for column in columns] for layer in range(found.layers)]
    drawn = axis.pcolormesh(edges, _edges(found), rows, norm=LogNorm(1, top), cmap="magma_r")
    axis.set(xlabel="optimizer step", ylabel="layer")
    axis.set_title("load: tokens of the fullest expert over the mean", loc="left")
    _colours(figure, axis, drawn, [tick for tick in (1, 1.5, 2, 3, 5, 8, 12, 20, 32, 64, 128) if tick <= top * 1.001])


def _draw_shares(figure, axis, found: "ExpertHistory") -> None:
    from matplotlib.colors import Normalize

    count = len(found.shares[0])
    least = 2.0**-REACH
    rows = [[math.log2(min(max(share * count, least), 1 / least)) for share in shares] for shares in found.shares]
    scale = Normalize(-REACH, REACH)
    drawn = axis.pcolormesh([at - 0.5 for at in range(count + 1)], _edges(found), rows, norm=scale, cmap="RdBu_r")
    axis.set(xlabel="expert", ylabel="layer")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set_title("each expert's share at the end, over the even one", loc="left")
    bar = _colours(figure, axis, drawn, range(-REACH, REACH + 1))
    bar.ax.set_yticklabels(["≤ 1/8", "1/4", "1/2", "1", "2", "4", "≥ 8"])


def _edges(found: "ExpertHistory") -> list[float]:
    return [found.first + at - 0.5 for at in range(found.layers + 1)]


def _colours(figure, axis, drawn, ticks):
    bar = figure.colorbar(drawn, ax=axis, ticks=list(ticks), aspect=12)
    bar.ax.minorticks_off()
    bar.ax.yaxis.set_major_formatter("{x:g}")
    bar.outline.set_visible(False)
    return bar


def binned(steps: list[int], values: list[list[float]], limit: int = COLUMNS) -> tuple[list[float], list[list[float]]]:
    """Edges of columns along the steps, and the values of each column, means over neighbours where there are more than `limit` steps."""
    count = min(limit, len(steps))
    bounds = [round(at * len(steps) / count) for at in range(count + 1)]
    columns = [[sum(layer) / len(layer) for layer in zip(*values[first:last])] for first, last in pairwise(bounds)]
    firsts = [steps[first] for first in bounds[:-1]]
    return [*(step - 0.5 for step in firsts), steps[-1] + 0.5], columns
