"""What torch says, asked in a child process, and what to make of it."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from llmtrain.hardware.messages import find
from llmtrain.tools.doctor.machine import AUTOLOAD, Line, Verdict
from llmtrain.tools.doctor.torch_child import MARK

PATIENCE = 180.0  # seconds: a first import from a slow network file system takes a minute

# The child sees modules in the same order as this process does: `python -m` looks into the current folder, the `llmtrain` command does not.
_START = "import sys, json; sys.path[:] = json.loads(sys.argv[1]); from llmtrain.tools.doctor.torch_child import main; main()"


def ask(env: Mapping[str, str], *, autoload: bool = True, npu: bool = True) -> dict[str, Any]:
    """The child's facts; `torch_error` if it did not get that far. `autoload` False: torch_npu does not load itself with torch."""
    child_env = {**env, "LLMTRAIN_DOCTOR_NPU": "1" if npu else "0", AUTOLOAD: "1" if autoload else "0"}
    command = [sys.executable, "-c", _START, json.dumps([os.path.abspath(entry) for entry in sys.path])]
    try:
        done = subprocess.run(command, env=child_env, capture_output=True, text=True, timeout=PATIENCE, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        return {"torch_error": f"importing torch took longer than {PATIENCE:.0f} s"}
    answers = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if answers:
        return json.loads(answers[-1][len(MARK) :])
    last = [line for line in done.stderr.splitlines() if line.strip()][-1:] or ["no output"]
    ended = f"signal {signal.Signals(-done.returncode).name}" if done.returncode < 0 else f"exit code {done.returncode}"
    return {"torch_error": f"the process that imports torch ended with {ended}: {last[0].strip()}"}


def probe(env: Mapping[str, str], *, npu_installed: bool) -> dict[str, Any]:
    """Ask as anybody would import torch; where that fails with torch_npu installed, also as llmtrain does, which loads torch_npu later."""
    facts = ask(env, autoload=env.get(AUTOLOAD) != "0", npu=npu_installed)
    if "torch_error" in facts and npu_installed:
        second = ask(env, autoload=False)
        facts = {**second, "plain_error": facts["torch_error"]} if "torch_error" not in second else facts
    return facts


def lines(facts: Mapping[str, Any], *, npu_wanted: bool) -> list[Line]:
    """The verdicts on importing torch and torch_npu. npu_wanted: an NPU is here or was asked for."""
    if "torch_error" in facts:
        text = f"`import torch` fails: {facts['torch_error']}"
        return [Line("torch", "import", Verdict.WRONG, text, _advice(text, "Reinstall torch: `pip install --force-reinstall torch`"))]
    build = f"CUDA {facts['cuda']}" if facts.get("cuda") else f"ROCm {facts['hip']}" if facts.get("hip") else "CPU build"
    found = [Line("torch", "import", Verdict.OK, f"torch {facts['torch']} ({build}), {facts['threads']} threads")]
    error = facts.get("npu_error") or facts.get("plain_error")
    if error and "torch_npu" not in facts:
        text = f"does not load: {error}"
        if "plain_error" in facts:
            text += f"; so plain `import torch` fails too, outside llmtrain, which sets {AUTOLOAD}=0"
        here = _advice(error, "See the lines of group ascend")
        fix = here if npu_wanted else f"No NPU is here: `pip uninstall torch-npu`, or `export {AUTOLOAD}=0` for other programs"
        found.append(Line("torch", "torch_npu", Verdict.WRONG if npu_wanted else Verdict.NOTE, text, fix))
    return found + _npus(facts, npu_wanted)


def _npus(facts: Mapping[str, Any], npu_wanted: bool) -> list[Line]:
    if "torch_npu" not in facts:
        return []
    if "npu_error" in facts:
        text = f"torch_npu {facts['torch_npu']} loads, but the NPU does not answer: {facts['npu_error']}"
        return [Line("torch", "torch_npu", Verdict.WRONG, text, _advice(text, "See the lines of group ascend"))]
    npus = facts.get("npus", [])
    if not npus:
        verdict, fix = (Verdict.WRONG, "See the lines of group ascend") if npu_wanted else (Verdict.NOTE, "")
        return [Line("torch", "torch_npu", verdict, f"torch_npu {facts['torch_npu']} loads and finds no NPU", fix)]
    if facts.get("npu_sum") != 8.0:
        text = f"the sum of eight ones on npu:0 is {facts.get('npu_sum')}"
        return [Line("torch", "torch_npu", Verdict.WRONG, text, "The device or CANN's kernels are broken; see the lines of group ascend")]
    return [Line("torch", "torch_npu", Verdict.OK, f"torch_npu {facts['torch_npu']}: {len(npus)} x {npus[0]}, computes")]


def _advice(text: str, otherwise: str) -> str:
    known = find(text)
    return known[0].advice if known else otherwise
