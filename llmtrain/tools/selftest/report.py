"""The file to send back: Markdown for people, with everything as JSON at its end."""

import json
from pathlib import Path

FENCE = "```"


def markdown(found: dict) -> str:
    """The whole file."""
    verdict = "nothing failed" if not found["failed"] else f"**{len(found['failed'])} failed**"
    parts = [f"# llmtrain selftest: {found['device']}, {found['ranks']} ranks: {verdict}\n", _machine(found)]
    if found["failed"]:
        parts.append("## Failed\n\n" + "\n".join(f"- {line}" for line in found["failed"]) + "\n")
    parts += [_parity(found), _kernels(found), _bench(found), _doctor(found)]
    parts.append(f"## All of it, for a program\n\n{FENCE}json\n{json.dumps(found, indent=1)}\n{FENCE}")
    return "\n".join(part for part in parts if part) + "\n"


def read(path: Path) -> dict:
    """What a file holds, from its JSON block. Raises ValueError where there is none."""
    _, marker, rest = path.read_text().rpartition(f"{FENCE}json\n")
    if not marker:
        raise ValueError(f"{path} has no JSON block: it is no file of llmtrain selftest")
    return json.loads(rest.rsplit(FENCE, 1)[0])


def verdicts(found: dict) -> list[str]:
    """The lines for the screen: what failed, and how much was tested."""
    lines = [f"failed: {line}" for line in found["failed"]]
    for part in ("parity", "kernels"):
        states = [line["state"] for line in found.get(part, [])]
        if states:
            lines.append(f"{part}: " + ", ".join(f"{states.count(s)} {s}" for s in ("passed", "failed", "refused") if states.count(s)))
    return lines


def _table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows]) + "\n"


def _machine(found: dict) -> str:
    facts = {"device": found["machine"]["device"], "started": found["started"], "took": f"{found['seconds']} s", **found["versions"]}
    return _table(["", ""], [[name, str(value)] for name, value in facts.items()])


def _parity(found: dict) -> str:
    if not found.get("parity"):
        return ""
    rows = []
    for line in found["parity"]:
        numbers = [_against(line, "loss"), _against(line, "gradient")]
        rows.append([line["name"], line.get("precision", ""), *numbers, _state(line)])
    text = (
        "Losses of 8 steps and gradients of the first, against one process on the CPU with the reference of every op. In fp32 the bound is "
        "5 times what that process differs from itself when its samples are summed in another order or its weights are moved by a unit "
        "of rounding.\n"
    )
    return f"## Parity\n\n{text}\n" + _table(["mesh", "format", "loss (allowed)", "gradient (allowed)", ""], rows)


def _against(line: dict, name: str) -> str:
    return f"{line[name]:.1e} ({line[name + '_bound']:.1e})" if name in line else ""


def _state(line: dict) -> str:
    why = line.get("error") or line.get("why") or ""
    word = f"**{line['state']}**" if line["state"] == "failed" else line["state"]
    return f"{word} {why}".strip().replace("|", "/").replace("\n", " ")


def _kernels(found: dict) -> str:
    """A row per implementation and format: its worst case, or the reason why it was not asked."""
    if not found.get("kernels"):
        return ""
    groups: dict[tuple[str, str, str], list[dict]] = {}
    for line in found["kernels"]:
        groups.setdefault((line["op"], line["implementation"], line["format"]), []).append(line)
    rows = [[*key, *_group(lines)] for key, lines in groups.items()]
    text = "The worst of each implementation's cases, forward and gradients: error relative to the float64 reference on the CPU.\n"
    return f"## Kernels\n\n{text}\n" + _table(["op", "implementation", "format", "worst", "error", "allowed", ""], rows)


def _group(lines: list[dict]) -> list[str]:
    parts = [(name, part, line) for line in lines for name, part in line.get("parts", {}).items()]
    refused = sum(line["state"] == "refused" for line in lines)
    failed = [line for line in lines if line["state"] == "failed"]
    if not parts:
        return ["", "", "", _state((failed or lines)[0])]
    name, part, line = max(parts, key=lambda item: item[1]["error"] / item[1]["bound"])
    state = f"**{len(failed)} failed**" if failed else "passed"
    more = f", {refused} of {len(lines)} cases refused" if refused else ""
    return [f"{line['case']}: {name}", f"{part['error']:.1e}", f"{part['bound']:.1e}", state + more]


def _bench(found: dict) -> str:
    if not found.get("bench"):
        return ""
    return "## Speed\n\nMedians.\n\n" + _table(["", "result", "seconds"], [[line["name"], *_speed(line)] for line in found["bench"]])


def _speed(line: dict) -> list[str]:
    if "error" in line:
        return [f"**failed** {line['error']}", ""]
    seconds = f"{line.get('seconds', line.get('step_seconds', 0)):.2g}"
    if "flops" in line:
        peak = f", {100 * line['flops'] / line['peak']:.0f}% of its peak" if line.get("peak") else ""
        return [f"{line['flops'] / 1e12:.3g} TFLOP/s{peak}", seconds]
    if "tokens_per_second" in line:
        mfu = f", MFU {100 * line['mfu']:.1f}%" if line.get("mfu") else ""
        return [
            f"{line['tokens_per_second']:,.0f} tokens/s in {line['format']}{mfu}, peak memory {line['memory'] / 2**30:.1f} GiB",
            seconds,
        ]
    return [f"{line['bytes_per_second'] / 1e9:.3g} GB/s", seconds]


def _doctor(found: dict) -> str:
    if "doctor" not in found:
        return ""
    wrong = found["doctor"]["wrong"]
    return (
        "## Doctor\n\n"
        + ("\n".join(f"- wrong: {line}" for line in wrong) if wrong else "Nothing wrong; all of its lines are below.")
        + "\n"
    )
