"""Fits `Rates` to published rows: least squares of the logarithms, robust, with each number held near what is known of it beforehand."""

import math
from collections.abc import Callable, Sequence

import numpy as np

from llmtrain.simulate.case import Case
from llmtrain.simulate.published import Published
from llmtrain.simulate.rates import NAMES, Rates
from llmtrain.simulate.step import price

SHARES = {"tp_hidden", "behind", "cp_hidden", "dp_hidden", "ep_hidden"}
"""Numbers between 0 and 1 that may come near to either; the others are positive."""
LOOSE = {
    **dict.fromkeys(("launch_nvidia", "launch_ascend", "product_bytes"), 0.4),
    **dict.fromkeys(("latency", "straggle", "tail"), 0.5),
    **dict.fromkeys(("step", "eager", "host_link"), 0.3),
    **dict.fromkeys(("contention_nvidia", "contention_ascend"), 0.6),
    "imbalance": 0.1,
}
"""How uncertain the starting values are, as a standard deviation of the logarithm (of the odds for shares)."""
USUAL, NOISE, BEND = 0.15, 0.10, 1.0
"""That of the others; that of a row; and how many of the latter a row may be off before its pull falls again (Cauchy)."""


def encode(rates: Rates) -> np.ndarray:
    """[numbers] without bounds."""
    values = [(name, getattr(rates, name)) for name in NAMES]
    return np.array([math.log(v / (1 - v)) if name in SHARES else math.log(v) for name, v in values])


def decode(vector: np.ndarray) -> Rates:
    """The inverse of `encode`."""
    return Rates(**{name: 1 / (1 + math.exp(-x)) if name in SHARES else math.exp(x) for name, x in zip(NAMES, vector)})


def chosen(row: Published, rates: Rates) -> Case:
    """The case of a row; of what the row leaves open, what gives most tokens a second."""
    known: dict = {}
    return row.cases[0] if len(row.cases) == 1 else min(row.cases, key=lambda case: price(case, rates, known).seconds / case.tokens)


def fit(rows: Sequence[Published], *, start: Rates | None = None, rounds: int = 20) -> Rates:
    """The rates that `rows` ask for; from their starting values on if `start` is not given, so that no other row has a say."""
    prior = encode(Rates())
    loose = np.array([0.6 if name in SHARES else LOOSE.get(name, USUAL) for name in NAMES])

    def residuals(vector: np.ndarray, cases: Sequence[Case]) -> np.ndarray:
        rates = decode(vector)
        measured = [row.seconds_of(case) for row, case in zip(rows, cases)]
        off = np.log([price(case, rates).seconds / seconds for case, seconds in zip(cases, measured)]) / NOISE
        return np.concatenate([off, (vector - prior) / loose])

    vector = encode(start or Rates())
    for _ in range(rounds):
        cases = [chosen(row, decode(vector)) for row in rows]
        vector, gained = _improve(lambda at, cases=cases: residuals(at, cases), vector, len(rows))
        if gained < 0.002:
            break
    return decode(vector)


def _improve(residuals: Callable[[np.ndarray], np.ndarray], vector: np.ndarray, rows: int) -> tuple[np.ndarray, float]:
    """A Gauss-Newton step, halved until it helps; and by how much the loss falls."""
    now = residuals(vector)
    columns = [(residuals(vector + 1e-3 * unit) - now) / 1e-3 for unit in np.eye(len(vector))]
    weights = np.ones(len(now))
    weights[:rows] = (1 + (now[:rows] / BEND) ** 2) ** -0.5
    jacobian = np.stack(columns, axis=1) * weights[:, None]
    step = np.linalg.lstsq(jacobian, -now * weights, rcond=None)[0]
    step *= min(1.0, 1.0 / max(1e-9, np.abs(step).max()))
    for _ in range(5):
        gained = _loss(now, rows) - _loss(residuals(vector + step), rows)
        if gained > 0:
            return vector + step, gained
        step /= 2
    return vector, 0.0


def _loss(values: np.ndarray, rows: int) -> float:
    bent = BEND**2 / 2 * np.log1p((values[:rows] / BEND) ** 2)
    return float(bent.sum() + (values[rows:] ** 2).sum() / 2)
