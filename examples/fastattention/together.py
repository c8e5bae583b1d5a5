"""Sums over ranks in tiles, and what of a long sequence fits where."""

import re
import subprocess
import sys
from pathlib import Path

import torch
from llmtrain_kernels import Mask
from llmtrain_kernels.tiled_reduce import attention_project_reduce

from llmtrain.ops.attention import attention_reference

ROOT = Path(__file__).resolve().parents[2]
MODEL = "examples/long_generation/pangu-38b"
PLAN = "--plan 262144 --tp 8 --tp-chunks 16 --batch 1 --hardware v100-32 --host-memory 512 --dtype fp16"


class _Done:
    def wait(self) -> None:
        """Nothing is under way."""


def reduced(tiles: int) -> float:
    """Largest error of attention, projection and sum in tiles by two halves of the heads, one after the other, against all heads at once.

    There are no ranks here, and nothing overlaps: it shows that tiles and halves make up the whole. In float64.
    """
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, 96, 32, dtype=torch.float64) for heads in (8, 4, 4))
    weight = torch.randn(64, 8 * 32, dtype=torch.float64)
    options = {"attention": attention_reference, "reduce": lambda part: _Done(), "mask": Mask(documents=((40, 56), (96,)))}
    with torch.no_grad():
        whole = attention_project_reduce(q, k, v, weight, count=1, **options)
        halves = [
            attention_project_reduce(*(x.chunk(2, 1)[half] for x in (q, k, v)), weight.chunk(2, 1)[half], count=tiles, **options)
            for half in range(2)
        ]
    return ((sum(halves) - whole).abs().max() / whole.abs().max()).item()


def reduce_bench(path: Path = ROOT / "bench/results/tiled_reduce-cpu.md") -> str | None:
    """From the results of bench/tiled_reduce.py: where they come from, and the table of the attention branch; None without results."""
    if not path.exists():
        return None
    text = path.read_text()
    origin = re.search(r"^`.*?\n\n", text, re.M | re.S)
    branch = re.search(r"^## One attention branch: (.*?)(?=^## |\Z)", text, re.M | re.S)
    if origin is None or branch is None:
        raise ValueError(f"{path} is not a page of bench/tiled_reduce.py")
    return f"{origin.group(0).strip()}\n\n{branch.group(1).strip()}"


def plan() -> str:
    """What `llmtrain generate --plan` says of 256K tokens. Raises RuntimeError with its words if it refuses."""
    command = [sys.executable, "-m", "llmtrain", "generate", str(ROOT / MODEL), *PLAN.split()]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(f"llmtrain generate --plan: {done.stderr.strip()}")
    return done.stdout.strip()
