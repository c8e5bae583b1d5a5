"""`llmtrain doctor [--device auto|cpu|cuda|npu] [--ranks N] [--json FILE]`."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from llmtrain.tools.doctor.examine import Report, examine
from llmtrain.tools.doctor.machine import Line, Verdict
from llmtrain.tools.launch import is_launched

STYLES = {Verdict.OK: "green", Verdict.NOTE: "yellow", Verdict.WRONG: "bold red"}


def main(argv: Sequence[str] | None = None) -> int:
    """Print the report; returns 0, or 1 when something is wrong."""
    args = _parser().parse_args(argv)
    report = examine(args.device, args.ranks, say=_say)
    if is_launched() and int(os.environ["RANK"]) > 0:
        return 1 if report.wrong else 0
    if args.json:
        Path(args.json).write_text(json.dumps(report.as_dict(), indent=1))
    show(report)
    return 1 if report.wrong else 0


def show(report: Report) -> None:
    """The report as tables, on stdout."""
    from rich.console import Console

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    for host, lines in {"": [line.as_dict() for line in report.lines], **report.others}.items():
        console.print(_table([Line(verdict=Verdict(line["verdict"]), **_rest(line)) for line in lines], title=host or None))
    wrong = report.wrong
    notes = sum(line.verdict is Verdict.NOTE for line in report.lines)
    text = f"{wrong} wrong" if wrong else "nothing wrong"
    console.print(
        f"{text}, {notes} note{'' if notes == 1 else 's'}. docs/doctor.md explains the lines.", style="bold red" if wrong else "bold green"
    )


def _rest(line: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in line.items() if name != "verdict"}


def _table(lines: Sequence[Line], *, title: str | None):
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=title, box=None, pad_edge=False, header_style="bold")
    for name in ("", "", "what"):
        table.add_column(name, no_wrap=name == "")
    table.columns[0].header, table.columns[1].header = "part", "verdict"
    group = None
    for line in lines:
        if group not in (None, line.group):
            table.add_row("", "", "")
        group = line.group
        style = STYLES[line.verdict]
        text = escape(line.text) + (f"\n[bold]do:[/bold] {escape(line.fix)}" if line.fix else "")
        table.add_row(f"{line.group} {line.name}", f"[{style}]{line.verdict.value}[/{style}]", text)
    return table


def _say(text: str) -> None:
    if not is_launched() or os.environ["RANK"] == "0":
        print(f"doctor: {text} ...", file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llmtrain doctor",
        description="Check this machine: versions that go together, drivers, packages, collectives, memory, links, clocks. "
        "Under torchrun or srun it checks every node and the collectives between them. Exit code 1 if something is wrong.",
    )
    parser.add_argument(
        "--device", default="auto", choices=("auto", "cpu", "cuda", "npu"), help="what runs are meant to use (auto: what is here)"
    )
    parser.add_argument(
        "--ranks", type=int, help="ranks of the collective test: one per device, or 2 on the CPU, if not given; 0 leaves it out"
    )
    parser.add_argument("--json", metavar="FILE", help="write the report there too")
    return parser
