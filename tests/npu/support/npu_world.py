"""What the ranks of a world of stand-ins run, for tests of this folder; calls of `npu::` ops come back with the numbers."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import torch

SUPPORT = Path(__file__).resolve().parent
SITE = SUPPORT / "site"
ROOT = SUPPORT.parents[2]


def environment(**extra: str) -> dict[str, str]:
    """Environment of a process in which `import torch_npu` brings the stand-in up."""
    path = os.pathsep.join([str(SITE), str(SUPPORT), *filter(None, [os.environ.get("PYTHONPATH")])])
    clean = {name: value for name, value in os.environ.items() if not name.startswith("HCCL_")}
    return clean | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"} | extra


def train_all(scenarios: dict[str, dict]) -> dict[str, dict]:
    """`sameness.train` of every scenario in this world, with `calls`: per op the least number that a rank made."""
    import sameness
    import stand_in

    runs = {}
    for name, scenario in scenarios.items():
        stand_in.calls.clear()
        runs[name] = sameness.train(**scenario)
        everyone: list = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everyone, dict(stand_in.calls))
        runs[name]["calls"] = {op: min(calls.get(op, 0) for calls in everyone) for op in set().union(*everyone)}
    return runs


def llmtrain(*arguments: str, calls: Path | None = None, timeout: float = 600.0, **extra: str) -> subprocess.CompletedProcess:
    """`python -m llmtrain ARGUMENTS`, its local ranks included, on stand-ins. A failure raises with the output."""
    extra |= {"NPU_CALLS": str(calls)} if calls else {}
    command = [sys.executable, "-m", "llmtrain", *arguments]
    ran = subprocess.run(command, cwd=ROOT, env=environment(**extra), capture_output=True, text=True, timeout=timeout)
    if ran.returncode:
        raise AssertionError(f"llmtrain {' '.join(arguments)} ended with {ran.returncode}:\n{ran.stdout[-3000:]}\n{ran.stderr[-5000:]}")
    return ran


def calls_of(folder: Path) -> list[Counter]:
    """Calls by op of every rank that wrote them to `folder`, which a launcher, no rank itself, may have done too."""
    ranks = sorted(folder.glob("rank-*.json")) or [folder / "alone.json"]
    return [Counter(json.loads(path.read_text())) for path in ranks]
