"""Where results come from."""

import os
import platform
import subprocess
import sys
import time
from pathlib import Path


def origin(script: str, before: float) -> dict:
    """Machine, date, commit, command and load averages of a measurement by `script`; `before` is the load when it began."""
    import torch

    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    processor = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())
    return {
        "machine": f"{processor}, {os.cpu_count()} logical cores, Linux {platform.release()}, torch {torch.__version__}",
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit,
        "command": f"python {' '.join([script, *sys.argv[1:]])}",
        "load": [before, os.getloadavg()[1]],
    }
