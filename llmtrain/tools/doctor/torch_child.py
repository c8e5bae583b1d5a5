"""Runs in a child process: imports torch, then torch_npu, and prints as JSON what they see. A crash here is a finding, not an end."""

import importlib
import json
import os
import sys
import traceback
from typing import Any

MARK = "doctor:"


def main() -> None:
    """Print one line, MARK and a JSON object; what the imports print besides goes to stderr."""
    out, sys.stdout = sys.stdout, sys.stderr
    facts = look()
    out.write(f"\n{MARK}{json.dumps(facts)}\n")
    out.flush()


def look() -> dict[str, Any]:
    """What torch and torch_npu say of themselves; `torch_error` or `npu_error` where they do not load."""
    facts: dict[str, Any] = {}
    try:
        torch = importlib.import_module("torch")
    except Exception as error:
        return {"torch_error": _words(error), "torch_trace": traceback.format_exc()[-2000:]}
    facts |= {"torch": torch.__version__, "torch_file": torch.__file__, "threads": torch.get_num_threads()}
    facts |= _cuda(torch)
    if "torch_npu" not in sys.modules and os.environ.get("LLMTRAIN_DOCTOR_NPU") == "1":
        try:
            importlib.import_module("torch_npu")
        except Exception as error:
            facts["npu_error"] = _words(error)
    if "torch_npu" in sys.modules:
        facts |= _npu(torch)
    return facts


def _cuda(torch: Any) -> dict[str, Any]:
    facts: dict[str, Any] = {"cuda": torch.version.cuda, "hip": torch.version.hip}
    if torch.version.cuda is None:
        return facts
    facts["architectures"] = torch.cuda.get_arch_list()
    try:
        facts["gpus"] = [
            {"name": p.name, "capability": [p.major, p.minor], "memory": p.total_memory}
            for p in map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
        ]
        facts["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    except (RuntimeError, AssertionError) as error:
        facts["cuda_error"] = _words(error)
    return facts


def _npu(torch: Any) -> dict[str, Any]:
    facts: dict[str, Any] = {"torch_npu": sys.modules["torch_npu"].__version__}
    try:
        facts["npus"] = [torch.npu.get_device_name(i) for i in range(torch.npu.device_count())]
        if facts["npus"]:
            free, total = torch.npu.mem_get_info(0)
            facts["npu_memory"] = [free, total]
            facts["npu_sum"] = float(torch.ones(8, device="npu:0").sum())
    except (RuntimeError, AssertionError, AttributeError) as error:
        facts["npu_error"] = _words(error)
    return facts


def _words(error: BaseException) -> str:
    parts = []
    while error is not None:
        parts.append(f"{type(error).__name__}: {error}")
        error = error.__cause__ or error.__context__
    return " <- ".join(dict.fromkeys(parts))
