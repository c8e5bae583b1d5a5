"""Starting `llmtrain` from tests of job files, in a folder and without what an outer launcher has set."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def environment() -> dict[str, str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "RANK", "WORLD_SIZE", "MASTER_"))}
    return env | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHON": sys.executable}


def llmtrain(words: list[str], folder: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "llmtrain", *words]
    return subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=600, stdin=subprocess.DEVNULL)
