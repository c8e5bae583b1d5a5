"""What a comparison found, for a human: on the terminal, as a Markdown page, as a plot."""

import math
from pathlib import Path

from llmtrain.errors import UserError
from llmtrain.tools.compare.judge import FACTOR, RULE, Comparison, Row
from llmtrain.tools.compare.trace import BACKWARD, FORWARD, WEIGHTS, Trace

HEADING = ("place", "shape", "|A-B|/|A|", "largest", "A off", "B off", "A's bound", "B's bound", "of bound", "")
TITLES = {WEIGHTS: "weights", FORWARD: "forward, in execution order", BACKWARD: "backward, in execution order"}
NEAR, MOST = 2, 12
"""Rows shown on each side of where the sides part, and rows outside of their bounds shown at most, unless all are asked for."""
A_COLOR, B_COLOR, BOUND_COLOR = "#1f4e8c", "#e07b00", "#999999"


def verdict(found: Comparison) -> str:
    """The one line that says where the sides part, or that they do not."""
    row = found.first
    judged = sum(not r.unjudged for r in found.rows)
    if row is None:
        worst = max((r for r in found.rows if not r.unjudged), key=lambda r: r.ratio, default=None)
        nearest = f"; nearest: {_place(worst)} at {worst.ratio:.2f} of its bound" if worst else ""
        return f"verdict: within the bounds at all {judged:,} places judged{nearest}"
    within = len(found.rows) - found.parted
    op = row.a.op or row.b.op
    kernels = f" (kernels.{op}: A {_kernel(found.a, op)}, B {_kernel(found.b, op)})" if op else ""
    before = f"everything before it is within; in all {found.parted:,} places are not, {within:,} are"
    return f"verdict: they part first at {_place(row)}{kernels}: {'; '.join(row.problems)}. {before[0].upper()}{before[1:]}"


def introduction(found: Comparison) -> list[str]:
    """What was compared: sides, settings that differ, step, and where the bounds come from."""
    lines = [_side("A", found.a), _side("B", found.b)]
    lines += [f"   {name}: A {a}, B {b}" for name, a, b in found.settings()]
    meta = found.a.meta
    lines.append(f"step {meta['step']}: {meta['rows']} x {meta['seq_len']:,} tokens of {meta['data']}, the same on both sides")
    lines.append(_bounds(found))
    lines += [_missing("A", found.only_a)] * bool(found.only_a) + [_missing("B", found.only_b)] * bool(found.only_b)
    return lines


def text(found: Comparison, *, everything: bool = False) -> str:
    """The report on a terminal; `everything` leaves out no row."""
    lines = introduction(found)
    rows = found.rows if everything else chosen(found)
    for phase, title in TITLES.items():
        own = [row for row in rows if row.a.phase == phase]
        if phase == WEIGHTS and not own:
            count = sum(row.a.phase == WEIGHTS for row in found.rows)
            lines += ["", f"weights: {count}, the same on both sides"]
            continue
        table = [HEADING, *(_cells(row, first=row is found.first) for row in own)]
        widths = [max(len(cells[i]) for cells in table) for i in range(len(HEADING))]
        lines += ["", f"{title}:", *("  ".join(_aligned(cells, widths)).rstrip() for cells in table)]
    hidden = len(found.rows) - len(rows)
    if hidden and not everything:
        lines += ["", f"{hidden:,} more places are not shown; --all prints them, --report FILE.md writes them"]
    return "\n".join([*lines, "", verdict(found)])


def chosen(found: Comparison) -> list[Row]:
    """The rows worth a look: whole blocks and what stands around them, where the sides part first with its neighbours, and the worst."""
    shown = {i for i, row in enumerate(found.rows) if row.a.phase != WEIGHTS and _whole(row.a.name)}
    wrong = [i for i, row in enumerate(found.rows) if row.problems]
    shown |= set(wrong[:MOST])
    if wrong:
        shown |= {i for i in range(wrong[0] - NEAR, wrong[0] + NEAR + 1) if 0 <= i < len(found.rows) and found.rows[i].a.phase != WEIGHTS}
    judged = [i for i, row in enumerate(found.rows) if not row.unjudged]
    if judged:
        shown.add(max(judged, key=lambda i: found.rows[i].ratio))
    return [row for i, row in enumerate(found.rows) if i in shown and (row.a.phase != WEIGHTS or row.problems)]


def write_page(found: Comparison, path: Path) -> list[Path]:
    """Write the whole table to the Markdown file `path`, and a plot beside it where matplotlib is installed; the files written."""
    page = ["# Comparison", "", "```text", *introduction(found), "```", "", verdict(found), ""]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        plot = _plot(found, path.with_suffix(".png"))
        page += [f"![distance from float64 by place]({plot.name})" if plot else "No plot: `pip install llmtrain[viz]`.", ""]
        for phase, title in TITLES.items():
            page += [
                f"## {title.capitalize()}",
                "",
                f"| {' | '.join(HEADING)} |".replace("|A-B|/|A|", "difference"),
                "| --- " * len(HEADING) + "|",
            ]
            page += [f"| {' | '.join(_cells(row, first=row is found.first))} |" for row in found.rows if row.a.phase == phase] + [""]
        path.write_text("\n".join(page), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error}; choose another --report") from error
    return [path, *([plot] if plot else [])]


def _plot(found: Comparison, path: Path) -> Path | None:
    """Distance of both sides by place, and their bounds; None without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    rows = [row for row in found.rows if row.a.phase != WEIGHTS and row.a.is_float and row.a.shape]
    figure = Figure(figsize=(11, 5), layout="constrained")
    axis = figure.subplots()
    shown = [("A", [_height(row.a.off) for row in rows], A_COLOR), ("B", [_height(row.b.off) for row in rows], B_COLOR)]
    if not found.referenced:
        shown = [("A to B", [_height(row.difference) for row in rows], A_COLOR)]
    for name, heights, color in shown:
        axis.plot(heights, color=color, linewidth=1.2, marker=".", markersize=3, label=name)
    axis.plot([_height(max(row.bound_a, row.bound_b)) for row in rows], color=BOUND_COLOR, linestyle="--", linewidth=1, label="bound")
    backward = next((i for i, row in enumerate(rows) if row.a.phase == BACKWARD), len(rows))
    axis.axvline(backward - 0.5, color=BOUND_COLOR, linewidth=0.8)
    axis.set(yscale="log", xlabel="place, in execution order: forward, then backward", ylabel="relative distance")
    if found.first in rows:
        at = rows.index(found.first)
        axis.axvline(at, color="#c62828", linewidth=1, linestyle=":")
        axis.annotate(_place(found.first), (at, axis.get_ylim()[1]), rotation=90, va="top", ha="right", fontsize=8, color="#c62828")
    axis.legend(frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    return path


def _height(value: float | None) -> float:
    return value if value and math.isfinite(value) else math.nan


def _whole(name: str) -> bool:
    parts = name.split(".")
    return len(parts) == 1 or (parts[0] == "blocks" and len(parts) == 2)


def _place(row: Row) -> str:
    return f"{row.a.name} ({row.a.phase})"


def _kernel(trace: Trace, op: str) -> str:
    return trace.meta["kernels"].get(op, "none")


def _side(name: str, trace: Trace) -> str:
    meta = trace.meta
    what = f"{meta['device']}; {meta['compute']}, engine {meta['engine']}, torch {meta['torch']}"
    return f"{name}: {meta['side'] or '(as configured)'} [{what}] loss {meta['loss']:.6f}"


def _bounds(found: Comparison) -> str:
    if found.referenced:
        return (
            f"off: distance from float64 on the CPU, relative to the tensor's norm. Bound: {FACTOR:g} times that of a control run "
            "(CPU, reference kernels, the side's format)"
        )
    return (
        f"there is no float64 reference on both sides: bounds are a rule of thumb, {RULE:g} units of rounding of the coarser format. "
        "Record without --no-reference for bounds measured on this model"
    )


def _missing(side: str, names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"only {side} has: {', '.join(names[:3])}{more}"


def _cells(row: Row, *, first: bool) -> tuple[str, ...]:
    shape = "x".join(map(str, row.a.shape)) or "1"
    if not row.a.is_float:
        allowed = "" if row.a.moved is None else f"{row.a.moved} moved"
        return (
            row.a.name,
            shape,
            f"{row.difference:.1e}",
            f"{row.largest:.0f} moved",
            allowed,
            _count(row.b.moved),
            "",
            "",
            *_mark(row, first),
        )
    numbers = (row.difference, row.largest, row.a.off, row.b.off, row.bound_a, row.bound_b)
    return (row.a.name, shape, *map(_number, numbers), *_mark(row, first))


def _count(moved: int | None) -> str:
    return "" if moved is None else f"{moved} moved"


def _mark(row: Row, first: bool) -> tuple[str, str]:
    if row.problems:
        return f"{row.ratio:,.1f}" if math.isfinite(row.ratio) else "", "<-- parts here" if first else "out"
    return ("", "not judged") if row.unjudged else (f"{row.ratio:.2f}", "")


def _number(value: float | None) -> str:
    return "-" if value is None else "0" if value == 0 else f"{value:.1e}"


def _aligned(cells: tuple[str, ...], widths: list[int]) -> list[str]:
    return [cell.ljust(width) if i < 2 or i == len(widths) - 1 else cell.rjust(width) for i, (cell, width) in enumerate(zip(cells, widths))]
