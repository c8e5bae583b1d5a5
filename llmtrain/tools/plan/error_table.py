"""`llmtrain plan errors`: predictions beside published rows, as text and as docs/plan-errors.md."""

import argparse
import re
from collections.abc import Iterator
from pathlib import Path

from llmtrain.simulate.errors import FEW, MEMORY_BOUND, PAIRS_BOUND, Checked, Report, SourceErrors, run
from llmtrain.simulate.rates import NAMES, Rates, fitted


def main(argv: list[str]) -> int:
    """The report; returns 0."""
    options = parser().parse_args(argv)
    report = run(Path(options.data) if options.data else None, again=options.refit)
    text = page(report)
    if options.out:
        Path(options.out).write_text(text)
        print(f"wrote {options.out}")
    else:
        print("\n".join(summary(report)))
        if options.rows:
            print("\n".join(row_lines(report)))
    return 0


def parser() -> argparse.ArgumentParser:
    """The words of `llmtrain plan errors`."""
    found = argparse.ArgumentParser("llmtrain plan errors", description="predictions beside published rows, leave-one-source-out")
    found.add_argument(
        "--data", metavar="FILE", help="a CSV of the columns of llmtrain/simulate/data/published.csv; that file if not given"
    )
    found.add_argument("--refit", action="store_true", help="fit the rates anew, all of them and without each source (minutes)")
    found.add_argument("--out", metavar="FILE", help="write the page docs/plan-errors.md")
    found.add_argument("--rows", action="store_true", help="every row, too")
    return found


def summary(report: Report) -> list[str]:
    """A table of sources, and the pairs."""
    lines = [
        "| source | rows | null model | ours | bound | within | memory rows | memory | within |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [_line(source) for source in report.sources]
    right, total = report.pairs
    share = f"{right / total:.1%}" if total else "-"
    lines += ["", f"Pairs of plans of one model on one hardware in the right order: {right} of {total}, {share} (bound {PAIRS_BOUND:.0%})."]
    return lines


def _line(source: SourceErrors) -> str:
    cells = [source.source, str(len(source.rows)), "", "", "", ""]
    if source.rows:
        cells[2:5] = [f"{source.null:.1%}", f"{source.ours:.1%}", f"{source.bound:.1%}"]
        cells[5] = ("yes" if source.ours <= source.bound else "**no**") if len(source.rows) >= FEW else "few rows"
    sizes = source.memory
    if not sizes:
        return f"| {' | '.join([*cells, '', '', ''])} |"
    mean = sum(sizes) / len(sizes)
    within = ("yes" if mean <= MEMORY_BOUND else "**no**") if len(sizes) >= FEW else "few rows"
    return f"| {' | '.join([*cells, str(len(sizes)), f'{mean:.1%}', within])} |"


def row_lines(report: Report) -> list[str]:
    """A table of rows."""
    head = ["", "| row | part | model | devices | mesh | measured | predicted | error |", "|---|---|---|---|---|---|---|---|"]
    return [*head, *(_row(row) for source in report.sources for row in source.rows)]


def _row(row: Checked) -> str:
    case = row.case
    axes = (("tp", case.tp), ("pp", case.pp), ("vpp", case.virtual), ("cp", case.cp), ("ep", case.ep), ("dp", case.dp))
    mesh = " ".join(f"{name}{size}" for name, size in axes if size > 1) or "one"
    values = row.published.row
    cells = (row.published.id, values["source"], values["model"], f"{case.devices:,}", f"{mesh}, {case.micros} x {case.micro_batch}")
    return f"| {' | '.join(cells)} | {row.measured:.3g} s | {row.predicted:.3g} s | {row.error:+.0%} |"


def page(report: Report) -> str:
    """docs/plan-errors.md."""
    return f"{_HEAD}\n" + "\n".join([*summary(report), "", *_rates(), "", "## Rows", *row_lines(report), "", *_others(report)]) + "\n"


def _rates() -> Iterator[str]:
    yield "## The rates"
    yield ""
    yield "What is fitted, for all machines and frameworks together; the start is what is known beforehand and what a fit is held near to."
    yield ""
    yield "| number | start | fitted |"
    yield "|---|---|---|"
    start, end = Rates(), fitted()
    for name in NAMES:
        yield f"| {name} | {getattr(start, name):.4g} | {getattr(end, name):.4g} |"


def _others(report: Report) -> Iterator[str]:
    if report.left_out:
        yield "## Left out"
        yield ""
        yield "| row | model | why |"
        yield "|---|---|---|"
        for row in report.left_out:
            yield f"| {row.id} | {row.row['model']} | {row.reason} |"
        yield ""
    yield "## Shown, neither fitted nor gated"
    yield ""
    yield "Rows of provenance abstract, secondary or recalled."
    yield ""
    yield "| row | source | model | measured | predicted | error |"
    yield "|---|---|---|---|---|---|"
    for one in report.shown:
        values = one.published.row
        times = f"{one.measured:.3g} s | {one.predicted:.3g} s | {one.error:+.0%}"
        yield f"| {one.published.id} | {values['source']} | {values['model']} | {times} |"


def committed(text: str) -> dict[str, tuple[float | None, float | None]]:
    """(time, memory) errors by source of a page that `page` has made; and under `pairs` the share of pairs in the right order."""
    found: dict[str, tuple[float | None, float | None]] = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 9 and cells[0] not in ("source", "---"):
            found[cells[0]] = (_percent(cells[3]), _percent(cells[7]))
    pairs = re.search(r"right order: \d+ of \d+, ([\d.]+%)", text)
    return found | ({"pairs": (_percent(pairs[1]), None)} if pairs else {})


def _percent(cell: str) -> float | None:
    return float(cell.rstrip("%")) / 100 if cell.endswith("%") else None


_HEAD = """# How far predictions are off

Published speeds and memory of other frameworks' runs (`llmtrain/simulate/data/published.csv`, where every row has its source), beside what
`llmtrain plan` says of them. Each source is predicted with rates that were fitted to all the others: a table and a figure of one
publication, or two files of one repository's benchmark, are one source. The null model takes the median MFU of the source for each of
its rows. The error of the time of a step is the mean of |predicted / measured - 1|; its bound is half the null model's or 10%, whichever
is larger; that of memory is 8%. Made by `llmtrain plan errors --out docs/plan-errors.md`; [plan.md](plan.md) says what the model is and
why some bounds are missed.
"""
