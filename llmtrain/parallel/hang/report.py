"""The report of a hang: who did not arrive, and a table of where every rank is. Plain text from what the ranks said; imports no torch."""

from collections.abc import Iterable, Sequence
from datetime import datetime

from llmtrain.parallel.hang.settle import settle

WAITS, FAILED, RUNS, RAISED, SILENT = "waits", "failed", "runs", "raised", "silent"
IN_COLLECTIVE = (WAITS, FAILED)
ANSWERED = (WAITS, FAILED, RUNS, RAISED)
ROWS = 16  # ranks above which ranks at the same place share a row
SHOWN_STACKS = 4
COLUMNS = ("rank", "state", "collective", "group", "step", "where", "for", "at")


def render(reports: dict[int, dict], *, timeout: float, full: bool = False) -> str:
    """The report as text. `reports` by rank as `Watch` makes them, `timeout` in seconds; `full` adds the stacks of all threads."""
    reports = settle(reports)
    guilty = absent(reports)
    parts = [headline(reports, guilty, timeout=timeout), table(reports), *_stacks(reports, guilty)]
    if full:
        stacks = ((rank, report["stack"]) for rank, report in sorted(reports.items()) if report.get("stack"))
        parts += [f"rank {rank}, all threads:\n{stack.rstrip()}" for rank, stack in stacks]
    return "\n\n".join(parts) + "\n"


def absent(reports: dict[int, dict]) -> list[int]:
    """Ranks that others wait for and that wait in no collective themselves."""
    missing = {rank for report in reports.values() for rank in _awaited(report, reports)}
    return sorted(rank for rank in missing if reports[rank]["state"] not in IN_COLLECTIVE)


def _awaited(report: dict, reports: dict[int, dict]) -> list[int]:
    """Whom a rank waits for: members of its group that are not in the same collective."""
    if report["state"] not in IN_COLLECTIVE:
        return []
    return [rank for rank in _members(report, reports) if rank in reports and _collective(reports[rank]) != _collective(report)]


def _members(report: dict, reports: dict[int, dict]) -> Iterable[int]:
    if report.get("peer", -1) >= 0:
        return [report["peer"]]
    return report.get("members") or reports


def _collective(report: dict) -> tuple | None:
    if report["state"] not in IN_COLLECTIVE:
        return None
    if report.get("peer", -1) >= 0:  # a send meets a receive
        return ("", frozenset((report["rank"], report["peer"])))
    return (report["op"], frozenset(report.get("members") or ()))


def headline(reports: dict[int, dict], guilty: Sequence[int], *, timeout: float) -> str:
    """Who did not arrive where, in a sentence or two."""
    waiting = [report for report in reports.values() if report["state"] in IN_COLLECTIVE]
    if not waiting:
        return "stopped: no rank waits in a collective any more"
    first = max(waiting, key=lambda report: (bool(set(_awaited(report, reports)) & set(guilty)), report.get("seconds") or 0))
    there = f"{first['op']} of group {first['group']}"
    others = [r["rank"] for r in waiting if _collective(r) == _collective(first)]
    waited = f"{ranks(others)} waited there for {first.get('seconds') or 0:.0f} s (parallel.timeout {timeout:g})"
    kind = "hang"
    if first["state"] == FAILED:
        kind = "stopped"
        waited = f"it failed on {ranks(others)}: {first.get('error')}"
    if guilty:
        mine = [rank for rank in guilty if rank in _awaited(first, reports)] or list(guilty)
        words = "; ".join(f"rank {rank} {_predicate(reports[rank])}" for rank in mine[:SHOWN_STACKS])
        return f"{kind}: {ranks(mine)} did not arrive at {there}; {waited}\n{words}"
    groups = {_collective(report): report for report in waiting}
    if len(groups) > 1:
        words = "; ".join(f"rank {report['rank']} is in {report['op']} of group {report['group']}" for report in groups.values())
        return f"{kind}: ranks wait for each other in different collectives: {words}; they do not call them in the same order"
    return f"{kind}: {ranks(others)} all are in {there} and it does not end ({waited}); suspect the network or a device"


def _predicate(report: dict) -> str:
    state = report["state"]
    words = {
        RUNS: "is in no collective",
        RAISED: f"raised {report.get('error')}",
        SILENT: "is on a machine that does not answer",
        "ended": "has ended",
        "stopped by a signal": "is stopped by a signal (SIGSTOP, Ctrl-Z or a debugger)",
        "does not answer": "does not answer: its threads cannot run Python code",
    }
    place = ", ".join(filter(None, [f"step {report['step']}" if report.get("step") else "", where(report), report.get("at")]))
    return f"{words.get(state, state)}; last seen at {place or 'an unknown place'}"


def ranks(numbers: Sequence[int]) -> str:
    """`rank 3`, `ranks 0-2, 5`."""
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    text = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)
    return f"rank{'s' if len(numbers) > 1 else ''} {text}"


def where(report: dict) -> str:
    """`block 3 backward, micro-batch 1`, or the phase."""
    layer = " ".join(filter(None, [report.get("layer"), report.get("direction")]))
    micro_batch = f"micro-batch {report['micro_batch']}" if report.get("micro_batch", -1) >= 0 else ""
    return ", ".join(filter(None, [report.get("phase"), layer, micro_batch]))


def table(reports: dict[int, dict]) -> str:
    """A row per rank; above ROWS ranks, those at the same place share one."""
    rows: dict[object, tuple[list[int], list[str]]] = {}
    for rank, report in sorted(reports.items()):
        cells = _cells(report)
        key = (*cells[:5], cells[6]) if len(reports) > ROWS else rank
        rows.setdefault(key, ([], cells))[0].append(rank)
    lines = [COLUMNS, *((ranks(numbers).split(" ", 1)[1], *cells) for numbers, cells in rows.values())]
    widths = [max(len(line[column]) for line in lines) for column in range(len(COLUMNS) - 1)]
    return "\n".join("  ".join([*(cell.ljust(width) for cell, width in zip(line, widths)), line[-1]]).rstrip() for line in lines)


def _cells(report: dict) -> list[str]:
    inside = report["state"] in IN_COLLECTIVE
    sequence = f" #{report['sequence']}" if report.get("sequence") is not None else ""
    peer = f" rank {report['peer']}" if report.get("peer", -1) >= 0 else ""
    return [
        report["state"],
        f"{report['op']}{sequence}{peer}" if inside else "-",
        report["group"] if inside else "-",
        str(report["step"]) if report.get("step") else "-",
        where(report) or "-",
        f"{report['seconds']:.1f} s" if report.get("seconds") is not None else "-",
        report.get("at") or "-",
    ]


def _stacks(reports: dict[int, dict], guilty: Sequence[int]) -> list[str]:
    """Python frames of the ranks that did not arrive, and of one rank per collective that waits."""
    waiting = {_collective(r): r["rank"] for _, r in sorted(reports.items(), reverse=True) if r["state"] in IN_COLLECTIVE}
    shown = []
    for rank in [*guilty[:SHOWN_STACKS], *list(waiting.values())[:2]]:
        report = reports[rank]
        lines = report.get("frames") or _main_thread(report.get("stack") or "")
        if lines:
            shown.append(f"rank {rank} ({report['state']}), innermost frame first:\n" + "\n".join(f"  {line}" for line in lines))
    return shown


def _main_thread(stacks: str) -> list[str]:
    """The main thread's part of what faulthandler wrote, which is the last."""
    return [line.strip() for line in stacks.strip().split("\n\n")[-1].splitlines()[1:13]]


def stamp() -> str:
    """The time now, for the file."""
    return datetime.now().astimezone().isoformat(timespec="seconds")
