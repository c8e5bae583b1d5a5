"""How far predictions are from published rows, beside the null model "median MFU of the source"; each source by rates fitted without it."""

import hashlib
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import yaml

from llmtrain.simulate.case import Case
from llmtrain.simulate.fit import chosen, fit
from llmtrain.simulate.published import DATA, Published, memory_error, model_flops_utilisation, read
from llmtrain.simulate.rates import FITTED, NAMES, Rates, fitted, stored
from llmtrain.simulate.step import price

FEW = 5
"""Rows from which a source has an error of its own that counts."""
MEMORY_BOUND, PAIRS_BOUND, TIME_FLOOR = 0.08, 0.80, 0.10


@dataclass(frozen=True)
class Checked:
    """A row, and what the model says of it."""

    published: Published
    case: Case
    measured: float
    predicted: float

    @property
    def error(self) -> float:
        """predicted / measured - 1."""
        return self.predicted / self.measured - 1

    @property
    def utilisation(self) -> float:
        """MFU as measured, of the keys that a token sees."""
        return model_flops_utilisation(self.case, self.measured, causal=True)

    @property
    def speed(self) -> tuple[float, float]:
        """Tokens per second and device, measured and predicted."""
        each = self.case.tokens / self.case.devices
        return each / self.measured, each / self.predicted


@dataclass(frozen=True)
class SourceErrors:
    """Of all rows of one source, which is a family: all tables and figures of one publication."""

    source: str
    rows: tuple[Checked, ...]
    memory: tuple[float, ...]

    @property
    def ours(self) -> float:
        """Mean of |error| of the step's time."""
        return statistics.fmean(abs(row.error) for row in self.rows)

    @property
    def null(self) -> float:
        """That of the median MFU of the source."""
        median = statistics.median(row.utilisation for row in self.rows)
        return statistics.fmean(abs(row.utilisation / median - 1) for row in self.rows)

    @property
    def bound(self) -> float:
        """What `ours` is held to."""
        return max(TIME_FLOOR, self.null / 2)


@dataclass(frozen=True)
class Report:
    """Of a file."""

    sources: tuple[SourceErrors, ...]
    left_out: tuple[Published, ...]
    """Rows that may be gated, but of which nothing can be predicted."""
    shown: tuple[Checked, ...]
    """Rows of other provenance."""

    @property
    def pairs(self) -> tuple[int, int]:
        """Of all pairs of plans of one model on one hardware: those ordered right, and all."""
        groups: dict[tuple[str, str, str, str], list[Checked]] = defaultdict(list)
        for source in self.sources:
            for row in source.rows:
                values = row.published.row
                groups[row.published.family, values["model"], row.case.hardware.key, values["seq"]].append(row)
        right = total = 0
        for rows in groups.values():
            for one, other in combinations(rows, 2):
                (first, first_said), (second, second_said) = one.speed, other.speed
                if first != second:
                    total += 1
                    right += (first > second) == (first_said > second_said)
        return right, total


def check(rows: Iterable[Published]) -> Report:
    """Every row by the rates that are fitted without its family."""
    sources: dict[str, tuple[list[Checked], list[float]]] = defaultdict(lambda: ([], []))
    left_out, shown = [], []
    for row in rows:
        if row.reason and row.gated:
            left_out.append(row)
        measured = row.seconds
        if measured:
            rates = fitted(row.family)
            case = chosen(row, rates)
            one = Checked(row, case, row.seconds_of(case), price(case, rates).seconds)
            (sources[row.family][0] if row.gated else shown).append(one)
        if row.gated and (error := memory_error(row)) is not None:
            sources[row.family][1].append(error)
    found = tuple(SourceErrors(name, tuple(times), tuple(sizes)) for name, (times, sizes) in sources.items())
    return Report(found, tuple(left_out), tuple(shown))


def families(rows: Iterable[Published]) -> list[str]:
    """Of rows that are fitted."""
    return sorted({row.family for row in rows if row.gated and row.seconds})


def refit(rows: Sequence[Published], path: Path = FITTED) -> None:
    """Fit all rows, and all but each family, and write the rates."""
    usable = [row for row in rows if row.gated and row.seconds]
    everything = fit(usable)
    without = {}
    for name in families(usable):
        print(f"  without {name}", flush=True)
        without[name] = _numbers(fit([row for row in usable if row.family != name]))
    values = {"data": digest(), "all": _numbers(everything), "without": without}
    path.write_text(
        "# Written by `llmtrain plan errors --refit` from published.csv; not by hand.\n" + yaml.safe_dump(values, sort_keys=False)
    )
    stored.cache_clear()


def digest(path: Path = DATA) -> str:
    """Of the data that rates are fitted to."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _numbers(rates: Rates) -> dict[str, float]:
    return {name: float(f"{getattr(rates, name):.4g}") for name in NAMES}


def run(path: Path | None = None, *, again: bool = False) -> Report:
    """The report on a file, the project's own rows if None. `again` fits the rates anew first."""
    own = read()
    if again:
        refit(own)
    return check(own if path is None else read(path))
