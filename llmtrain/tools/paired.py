"""Differences between scores of the same items, and how sure they are.

    llmtrain eval compare base.json treated.json

The bootstrap draws items (and runs) with replacement, all from one seed, so that a figure can be had again.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llmtrain.errors import UserError

DRAWS, SEED = 2000, 1234
SEEN = 2.8
"""Standard errors of the smallest effect that a two-sided test at 5% finds with 80% probability (1.96 + 0.84)."""


class Difference(NamedTuple):
    """A mean difference with its bootstrap error."""

    mean: float
    error: float
    """Standard deviation of the bootstrap's means."""
    low: float
    high: float
    """The middle 95% of them."""

    @property
    def detectable(self) -> float:
        """The smallest true difference that this many items (and runs) would have found, 4 times of 5 at the level of 5%."""
        return SEEN * self.error


def standard_error(values: Sequence[float]) -> float:
    """Of the mean; NaN for a single value."""
    return float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan


def bootstrap(differences: np.ndarray, *, draws: int = DRAWS, seed: int = SEED) -> Difference:
    """Of `differences` [items] or [runs, items]: of the latter, runs and items are drawn anew, each on its own."""
    table = np.atleast_2d(np.asarray(differences, dtype=float))
    return _summary(table.mean(), _means(table, _drawn_items(table.shape[1], draws, seed), seed=seed + 1))


def bootstrap_between(one: np.ndarray, other: np.ndarray, *, draws: int = DRAWS, seed: int = SEED) -> Difference:
    """Of mean(one) - mean(other), [runs, items] each, over the same items, which are drawn alike for both."""
    items = _drawn_items(one.shape[1], draws, seed)
    means = _means(one, items, seed=seed + 1) - _means(other, items, seed=seed + 2)
    return _summary(one.mean() - other.mean(), means)


def _drawn_items(items: int, draws: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, items, size=(draws, items))


def _means(table: np.ndarray, items: np.ndarray, *, seed: int) -> np.ndarray:
    runs = np.random.default_rng(seed).integers(0, len(table), size=(len(items), len(table)))
    return np.array([table[rows][:, columns].mean() for rows, columns in zip(runs, items)])


def _summary(mean: float, means: np.ndarray) -> Difference:
    low, high = np.quantile(means, [0.025, 0.975])
    return Difference(float(mean), float(means.std()), float(low), float(high))


def scores(path: Path) -> dict[str, np.ndarray]:
    """Scores per item of a file that `llmtrain eval --out` wrote, by figure. Raises UserError if it holds none."""
    try:
        kind, results = (value := json.loads(path.read_text(encoding="utf-8")))["evaluation"], value["results"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}: not a file that `llmtrain eval --out` wrote") from None
    if kind == "dialogue":
        return {"dialogue f1": np.array([item["f1"] for item in results["items"]])}
    if kind == "tasks":
        return {
            f"{task} {metric}": np.array(values) for task, result in results.items() for metric, values in result.get("items", {}).items()
        }
    raise UserError(f"{path}: an evaluation {kind!r} has no scores per item; allowed are dialogue and tasks")


def compare(one: Path, other: Path) -> dict[str, dict]:
    """What `other` has above `one`, by figure that both have. Raises UserError if they measured different items."""
    left, right = scores(one), scores(other)
    shared = [name for name in left if name in right]
    if not shared:
        raise UserError(f"{one} and {other} have no figure in common: {', '.join(left) or 'none'} and {', '.join(right) or 'none'}")
    results = {}
    for name in shared:
        if len(left[name]) != len(right[name]):
            raise UserError(f"{name}: {len(left[name])} items in {one}, {len(right[name])} in {other}; they must be the same items")
        found = bootstrap(right[name] - left[name])
        values = {"items": len(left[name]), "first": float(left[name].mean()), "second": float(right[name].mean())}
        results[name] = values | found._asdict() | {"detectable": found.detectable}
    return results


def table(results: dict[str, dict]) -> str:
    """The comparison as a Markdown table."""
    lines = ["| figure | items | first | second | difference | +/- | 95% | detectable |", "|---|--:|--:|--:|--:|--:|--:|--:|"]
    for name, r in results.items():
        between = f"{r['low']:+.3f} to {r['high']:+.3f}"
        figures = f"{r['first']:.3f} | {r['second']:.3f} | {r['mean']:+.3f} | {r['error']:.3f} | {between} | {r['detectable']:.3f}"
        lines.append(f"| {name} | {r['items']:,} | {figures} |")
    return "\n".join(lines)
