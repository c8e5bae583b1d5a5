"""`llmtrain doctor` as a part of the self-test, in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

LIMIT = 240.0
"""Seconds it may take."""


def doctor(device: str, ranks: int, folder: Path) -> dict:
    """Its report, and the lines that are wrong; or the reason why there is none."""
    out = folder / "doctor.json"
    command = [sys.executable, "-m", "llmtrain", "doctor", "--device", device, "--ranks", str(ranks), "--json", str(out)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        return {"wrong": [f"no answer within {LIMIT:g} s"]}
    if not out.exists():
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        return {"wrong": [f"it ended with {done.returncode}: {last}"]}
    report = json.loads(out.read_text())
    return {"report": report, "wrong": list(_wrong(report))}


def _wrong(node: object):
    """The lines of the report, wherever they are in it, whose verdict is `WRONG`."""
    if isinstance(node, list):
        for item in node:
            yield from _wrong(item)
    elif isinstance(node, dict):
        if str(node.get("verdict", "")).upper() == "WRONG":
            yield " ".join(str(node[name]) for name in ("group", "name", "text", "fix") if node.get(name))
        for item in node.values():
            yield from _wrong(item)
