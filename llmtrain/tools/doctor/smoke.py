"""The collective test: ranks in child processes, here or where torchrun or srun has put this process."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmtrain.hardware.messages import find
from llmtrain.tools.doctor import clock
from llmtrain.tools.doctor.machine import Line, Verdict

PATIENCE = 60.0  # seconds a collective gets
TOTAL = 600.0  # seconds the whole test gets, importing torch included
BACKENDS = {"cpu": "gloo", "cuda": "nccl", "npu": "hccl"}
_MODULE = ["-W", "ignore", "-m", "llmtrain.tools.doctor.smoke_rank"]


@dataclass
class Smoke:
    """What came of it: this node's lines and those of the others by host."""

    lines: list[Line] = field(default_factory=list)
    others: dict[str, list[dict[str, str]]] = field(default_factory=dict)


def local(kind: str, ranks: int, env: Mapping[str, str]) -> Smoke:
    """Run the test with `ranks` ranks on this machine."""
    with tempfile.TemporaryDirectory(prefix="llmtrain-doctor-") as folder:
        # A launcher process: it forwards signals, kills what hangs, and needs the main thread of a process.
        code = (
            "import sys; from pathlib import Path; from llmtrain.tools.launch import run_local; n, folder, *argv = sys.argv[1:]; "
            f"sys.exit(run_local(argv, int(n), command=[sys.executable, *{_MODULE!r}], logs=Path(folder)))"
        )
        out = str(Path(folder) / "result-")
        command = [sys.executable, "-c", code, str(ranks), folder, out, kind, str(PATIENCE)]
        text = _run(command, {name: value for name, value in env.items() if name != "RANK"}, patience=TOTAL)
        results = [json.loads(path.read_text()) for path in sorted(Path(folder).glob("result-*")) if path.suffix != ".part"]
        return judge(kind, ranks, results, text)


def launched(kind: str, lines: Sequence[Line], env: Mapping[str, str]) -> Smoke:
    """Run the test as the rank that this process is (torchrun, srun); `lines` are this node's findings, for rank 0 to show."""
    with tempfile.TemporaryDirectory(prefix="llmtrain-doctor-") as folder:
        out, mine = Path(folder) / "result-", Path(folder) / "lines.json"
        mine.write_text(json.dumps([line.as_dict() for line in lines]))
        text = _run([sys.executable, *_MODULE, str(out), kind, str(PATIENCE), str(mine)], env, patience=TOTAL)
        results = [json.loads(path.read_text()) for path in Path(folder).glob("result-*") if path.suffix != ".part"]
        return judge(kind, int(env["WORLD_SIZE"]), results, text, only=True)


def judge(kind: str, ranks: int, results: Sequence[dict[str, Any]], text: str, *, only: bool = False) -> Smoke:
    """Make lines of the ranks' results; `only`: the results of the other ranks are theirs to show. `text`: what the ranks printed."""
    name = f"{BACKENDS[kind]}, {ranks} rank{'s' if ranks > 1 else ''}"
    if len(results) < (1 if only else ranks):
        return Smoke([_failed(kind, name, text)])
    wrong = sorted({test for result in results for test, outcome in result["collectives"].items() if not outcome["right"]})
    if wrong:
        fix = "The library or the device computes wrongly: run with one rank, then two; report it with the versions above"
        return Smoke([Line("collectives", name, Verdict.WRONG, f"wrong results of {', '.join(wrong)}", fix)])
    slowest = {test: max(result["collectives"][test]["seconds"] for result in results) for test in results[0]["collectives"]}
    times = ", ".join(f"{test} {seconds * 1e3:.1f} ms" for test, seconds in slowest.items())
    smoke = Smoke([Line("collectives", name, Verdict.OK, f"results right; 4 MiB per rank: {times}")])
    first = next((result for result in results if result["rank"] == 0), None)
    if first is not None:
        smoke.lines += [clock.verdict(f"of {host}", ahead, precision=within) for host, (ahead, within) in first["clocks"].items()]
        own = first["nodes"][0]["host"]
        smoke.others = {node["host"]: node["lines"] for node in first["nodes"] if node["local"] == "0" and node["host"] != own}
    return smoke


def _failed(kind: str, name: str, text: str) -> Line:
    known = find(text)
    told = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("launch:")]
    last = next((line for line in reversed(told) if "Error" in line or "error" in line), told[-1] if told else "no output")
    fix = known[0].advice if known else f"Run `{BACKENDS[kind].upper()}_DEBUG=INFO llmtrain doctor` with fewer ranks; see docs/doctor.md"
    if kind == "cpu" and not known:
        fix = "Set GLOO_SOCKET_IFNAME to an interface that the ranks share (`ip -brief address`), and check free ports and /tmp"
    return Line("collectives", name, Verdict.WRONG, last[:300], fix)


def _run(command: Sequence[str], env: Mapping[str, str], *, patience: float) -> str:
    env = {**env, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
    process = subprocess.Popen(
        command, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    try:
        return process.communicate(timeout=patience)[0]
    except subprocess.TimeoutExpired:
        process.terminate()
        try:
            text = process.communicate(timeout=15)[0]
        except subprocess.TimeoutExpired:
            process.kill()
            text = process.communicate()[0]
        return f"{text}\nTimeoutError: no result within {patience:.0f} s"
