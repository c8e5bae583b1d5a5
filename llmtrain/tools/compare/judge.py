"""Two traces beside each other: what differs, by how much, what is allowed, and where they part first."""

import math
from dataclasses import dataclass

from llmtrain.config.layer import dotted
from llmtrain.config.load import leaves
from llmtrain.errors import UserError
from llmtrain.tools.compare.measure import distance, moved, scales
from llmtrain.tools.compare.trace import WEIGHTS, Point, Trace

FACTOR = 5.0
"""How many times as far from float64 as the control run a side may be; the same as in docs/parity.md."""
RULE = 64.0
"""Without a reference: units of rounding of the coarser compute format by which the sides may differ."""
ROUNDING = {
    "fp64": 2.0**-53,
    "fp32": 2.0**-24,
    "bf16": 2.0**-8,
    "fp16": 2.0**-11,
    "float64": 2.0**-53,
    "float32": 2.0**-24,
    "bfloat16": 2.0**-8,
    "float16": 2.0**-11,
}
_ASIDE = ("name", "output", "checkpoint", "metrics", "guards")  # sections that change no number of a step


@dataclass(frozen=True)
class Row:
    """One place of the step on both sides. Distances are relative to the norm of the tensor, `largest` is an absolute difference."""

    a: Point
    b: Point
    difference: float
    largest: float
    bound_a: float
    bound_b: float
    problems: tuple[str, ...]
    """Why this place is where the sides part, one text per reason; empty where it is within its bounds."""
    ratio: float
    """Worst distance over its bound."""

    @property
    def unjudged(self) -> str | None:
        """Why this place was not held to a bound."""
        return self.a.unjudged or self.b.unjudged


@dataclass(frozen=True)
class Comparison:
    """Everything that `llmtrain compare` reports."""

    a: Trace
    b: Trace
    rows: list[Row]
    only_a: list[str]
    only_b: list[str]
    referenced: bool
    """Whether bounds come from a reference in float64."""

    @property
    def first(self) -> Row | None:
        """Where the sides part, in execution order; None if nowhere."""
        return next((row for row in self.rows if row.problems), None)

    @property
    def parted(self) -> int:
        """Number of places outside of their bounds."""
        return sum(bool(row.problems) for row in self.rows)

    def settings(self) -> list[tuple[str, str, str]]:
        """(option, A's value, B's value) of all that differs in the configurations, and implementations of ops that do."""
        a, b = (dict(_leaves(trace)) for trace in (self.a, self.b))
        return [(name, a.get(name, "-"), b.get(name, "-")) for name in [*a, *(n for n in b if n not in a)] if a.get(name) != b.get(name)]


def compare(a: Trace, b: Trace) -> Comparison:
    """Compare two measured traces of one step. Raises UserError if they did not read the same batch."""
    if a.meta["batch"] != b.meta["batch"]:
        which = ", ".join(
            f"{key} {a.meta[key]} and {b.meta[key]}" for key in ("step", "rows", "seq_len", "data") if a.meta[key] != b.meta[key]
        )
        raise UserError(
            f"A and B read different batches ({which or 'other tokens'}): give both the same data, seed, train.seq_len, --step and --rows"
        )
    referenced = all(any(p.off is not None for p in trace.points) for trace in (a, b))
    mine, theirs, least = a.by_key(), b.by_key(), scales(a)
    units = max(ROUNDING[a.meta["compute"]], ROUNDING[b.meta["compute"]])
    rows = [_row(p, theirs[p.key], least=least, referenced=referenced, units=units, traces=(a, b)) for p in a.points if p.key in theirs]
    only_a = [_called(p) for p in a.points if p.key not in theirs]
    only_b = [_called(p) for p in b.points if p.key not in mine]
    return Comparison(a, b, rows, only_a, only_b, referenced)


def bound(point: Point, compute: str) -> float:
    """How far `point` may be from float64: FACTOR times the control run, or times a unit of rounding of its own format if that is more.

    A single number may be right by luck in the control run, so it may also be off by a unit of the compute format, or FACTOR of those of
    fp32, in which it was summed. Weights are exact.
    """
    if point.phase == WEIGHTS:
        return 0.0
    least = FACTOR * max(point.control or 0.0, ROUNDING.get(point.dtype, 0.0))
    unit = ROUNDING[compute]
    return least if point.shape else max(least, unit, FACTOR * min(unit, ROUNDING["fp32"]))


def _row(a: Point, b: Point, *, least: dict, referenced: bool, units: float, traces: tuple[Trace, Trace]) -> Row:
    if a.shape != b.shape:
        problem = f"shapes differ: A {list(a.shape)}, B {list(b.shape)}"
        return Row(a, b, math.inf, math.inf, 0.0, 0.0, (problem,), math.inf)
    if not a.is_float:
        return _choices(a, b)
    difference, largest = distance(b, a, least), _largest(a, b)
    if a.phase == WEIGHTS:
        problems = (f"the weights differ before the step begins, by {largest:.1e}",) if largest else ()
        return Row(a, b, difference, largest, 0.0, 0.0, problems, math.inf if largest else 0.0)
    if referenced:
        bounds = [bound(point, trace.meta["compute"]) for point, trace in zip((a, b), traces)]
        judged = [(side, point.off, limit) for side, point, limit in zip("AB", (a, b), bounds) if point.off is not None]
    else:
        bounds = [RULE * units, RULE * units]
        judged = [("the difference", difference, RULE * units)]
    ratios = [off / limit for _, off, limit in judged]
    excused = a.unjudged or b.unjudged
    problems = [] if excused else [_too_far(side, off, limit, referenced) for side, off, limit in judged if off > limit]
    problems = [*_not_finite(a, b), *problems]
    return Row(a, b, difference, largest, bounds[0], bounds[1], tuple(problems), max(ratios, default=0.0))


def _too_far(side: str, off: float, limit: float, referenced: bool) -> str:
    return f"{side} is {off:.1e}{' off float64' if referenced else ''}, {off / limit:,.1f} times the bound {limit:.1e}"


def _not_finite(a: Point, b: Point) -> list[str]:
    """One text per side that has NaN or infinities where the other has none, or fewer."""
    if a.bad == b.bad:
        return []
    return [
        f"{side} has {point.bad:,} values that are NaN or infinite, first at index {list(point.first_bad or ())} of {list(point.shape)}"
        for side, point, other in (("A", a, b), ("B", b, a))
        if point.bad > other.bad
    ]


def _choices(a: Point, b: Point) -> Row:
    """Experts chosen [N,k]: as many tokens may go elsewhere as FACTOR times those of the control run."""
    problems, ratio, between = [], 0.0, moved(b, a)
    for side, point in (("A", a), ("B", b)):
        if point.moved is not None:
            allowed = FACTOR * max(1, point.moved_control or 0)
            ratio = max(ratio, point.moved / allowed)
            if point.moved > allowed and point.unjudged is None:
                problems.append(
                    f"{side} sends {point.moved:,} of {point.shape[0]:,} tokens to other experts; rounding explains {allowed:.0f}"
                )
    return Row(a, b, between / max(1, a.shape[0]), float(between), 0.0, 0.0, tuple(problems), ratio)


def _largest(a: Point, b: Point) -> float:
    mine, theirs = a.values.double(), b.values.double()
    keep = mine.isfinite() & theirs.isfinite()
    return (mine[keep] - theirs[keep]).abs().max().item() if keep.any() else 0.0


def _called(point: Point) -> str:
    return f"{point.name} ({point.phase})"


def _leaves(trace: Trace) -> list[tuple[str, str]]:
    config = {key: value for key, value in trace.meta["config"].items() if key not in _ASIDE and key != "kernels"}
    values = [(dotted(path), str(value)) for path, value in leaves(config)]
    return [*values, *((f"kernels.{op}", name) for op, name in trace.meta["kernels"].items())]
