"""bench/tiled_reduce.py: its arithmetic, and a short run on a limited wire."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"
sys.path.insert(0, str(BENCH))

from tiles import report  # noqa: E402
from tiles.job import Branch, Prompt  # noqa: E402
from wire import network  # noqa: E402

NO_NETWORK = network.refuse()


def test_the_page_says_what_was_measured():
    """Four tiles that compute for 2 s and are sent for 1 s in all: at best 0.75 s are saved; here 0.6 s of 0.8 are hidden."""
    wire = {"rate": 5e8, "send": {"1": [1.0], "4": [0.8, 0.9, 0.7]}, "both": {"1": [3.0, 3.1, 2.9], "4": [2.4, 2.5, 2.3]}}
    found = {"compute": {"1": [2.0], "4": [2.2]}, "wires": [wire], "prompts": [{"rate": None, "both": {"1": [2.0], "4": [1.0]}}]}
    found |= {"branch": list(Branch()), "prompt": list(Prompt()), "load": [0, 0], "seconds": 1.0, "attention": "tiled"}
    text = report.page(found | {"command": "c", "date": "d", "commit": "0123456789", "machine": "m"})
    assert "| 500 Mbit/s | 4 | 2.200 | 0.800 | 2.400 (2.300-2.500) | 0.600 | 0.750 | **80%** | 75% (75%) |" in text
    assert "| 500 Mbit/s | 1 | 2.000 | 1.000 | 3.000 (2.900-3.100) | | | | 0% (0%) |" in text
    assert "| no limit | 4 | 1.000 (1.000-1.000) | 2.00x |" in text


@pytest.mark.skipif(NO_NETWORK is not None, reason=str(NO_NETWORK))
def test_a_short_run_on_a_wire(tmp_path):
    words = {"tiles": ["1", "2"], "rounds": ["1"], "tokens": ["256"], "prompt-tokens": ["32"], "ratios": ["2"], "out": [tmp_path / "r.md"]}
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(BENCH.parent), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, str(BENCH / "tiled_reduce.py"), *(str(w) for name, of in words.items() for w in (f"--{name}", *of))]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    rows = [line for line in (tmp_path / "r.md").read_text().splitlines() if line.startswith("| ") and "Mbit/s |" in line]
    assert [row.split("|")[2].strip() for row in rows] == ["1", "2", "1", "2"], rows
