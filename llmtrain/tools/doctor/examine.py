"""All checks in order, and what they found as one report."""

import os
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmtrain.tools.doctor import ascend, clock, nvidia, packages, smoke, system, torch_probe
from llmtrain.tools.doctor.machine import Line, Machine, Verdict
from llmtrain.tools.launch import is_launched


@dataclass
class Report:
    """The lines of this node, of the others by host, and torch's facts."""

    lines: list[Line] = field(default_factory=list)
    others: dict[str, list[dict[str, str]]] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def wrong(self) -> int:
        """How many lines are WRONG, all nodes together."""
        return sum(line.verdict is Verdict.WRONG for line in self.lines) + sum(
            line["verdict"] == Verdict.WRONG.value for lines in self.others.values() for line in lines
        )

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"wrong": self.wrong, "lines": [line.as_dict() for line in self.lines], "nodes": self.others, "torch": self.facts}


def examine(
    device: str = "auto", ranks: int | None = None, *, machine: Machine | None = None, say: Callable[[str], None] = lambda text: None
) -> Report:
    """Examine this machine. device: auto, cpu, cuda or npu: what a run is meant to use; auto judges what is here.

    ranks: of the collective test, by default one per device, at most 8, and 2 on the CPU; 0 leaves it out. Under torchrun or srun the
    test spans the ranks that were started, and only the first of each node looks at it. say: told what is being done.
    """
    machine = machine or Machine()
    first_of_node = not is_launched() or os.environ.get("LOCAL_RANK", "0") == "0"
    npu = device == "npu" or (device == "auto" and ascend.present(machine))
    cuda = device == "cuda" or (device == "auto" and nvidia.present(machine))
    report = Report()
    torch_npu = packages.version("torch-npu", sys.path)
    say("importing torch in a child process")
    report.facts = torch_probe.probe(machine.env, npu_installed=torch_npu is not None) | {"python": platform.python_version()}
    if first_of_node:
        say("looking at packages, drivers and devices")
        report.lines += system.lines(machine, accelerator=npu or cuda) + packages.lines()
        report.lines += torch_probe.lines(report.facts, npu_wanted=npu)
        triton = packages.version("triton-ascend", sys.path)
        if device in ("auto", "npu"):
            report.lines += ascend.lines(machine, report.facts, wanted=device == "npu", torch_npu=torch_npu, triton_ascend=triton)
        if device in ("auto", "cuda"):
            report.lines += nvidia.lines(machine, report.facts, wanted=device == "cuda")
    _collectives(report, device, ranks, machine=machine, say=say)
    if first_of_node and not report.others:
        report.lines.append(clock.file_system(Path.cwd()))
    return report


def _collectives(report: Report, device: str, ranks: int | None, *, machine: Machine, say: Callable[[str], None]) -> None:
    """Run the collective test on gloo, and on the devices' own library where torch sees devices."""
    if "torch" not in report.facts or ranks == 0:
        return
    kinds = [kind for kind in ("cuda", "npu") if _count(report.facts, kind) and device in ("auto", kind)] or ["cpu"]
    for kind in kinds:
        if is_launched():
            say(f"collectives over {smoke.BACKENDS[kind]}, {os.environ['WORLD_SIZE']} ranks")
            outcome = smoke.launched(kind, report.lines, os.environ)
        else:
            count = ranks or min(_count(report.facts, kind), 8) if kind != "cpu" else ranks or 2
            say(f"collectives over {smoke.BACKENDS[kind]}, {count} ranks")
            outcome = smoke.local(kind, count, machine.env)
        report.lines += outcome.lines
        report.others |= outcome.others


def _count(facts: dict[str, Any], kind: str) -> int:
    return len(facts.get({"cuda": "gpus", "npu": "npus"}.get(kind, ""), []))
