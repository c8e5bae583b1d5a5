"""examples/fastattention: the page has every claim, and its numbers are those of the code."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples/fastattention"


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """The page of a quick run."""
    out = tmp_path_factory.mktemp("fastattention") / "results.md"
    command = [sys.executable, str(EXAMPLE / "run.py"), "--quick", "--out", str(out)]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path})
    assert done.returncode == 0, done.stderr[-2000:]
    assert out.read_text() in done.stdout
    return out.read_text()


def test_every_claim_says_what_was_found_or_that_nothing_was(quick):
    rows = [line.split(" | ") for line in quick.partition("## Claim by claim")[2].partition("\n- ")[0].splitlines()[4:] if line]
    assert len(rows) == 14 and all(row[1] in ("abstract", "reviews", "recalled") and row[2].strip() for row in rows)
    speeds = [row for row in rows if re.search(r"\d\.\d+x", row[0])]
    assert len(speeds) == 5 and all("not measured: no such hardware here" in row[2] for row in speeds)


def test_masks_tiles_and_numbers(quick):
    assert "8 GiB dense, 2 MiB tiled at 65,536 tokens" in quick
    assert "| causal | 36 | 28 | 8 | 10 | 36 |" in quick  # 8 x 8 small tiles, 4 x 4 large ones
    assert "all within their bounds of float64" in quick and "every pair right" in quick
    factor = float(re.search(r"added ([\d.]+) times", quick).group(1))
    assert 1.8 < factor < 2.2


def test_a_wrong_number_is_named(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLE))
    monkeypatch.syspath_prepend(str(ROOT / "tests/kernels/support"))
    import page

    good = {"name": "a", "dtype": "fp32", "out": 1e-6, "gradients": 1e-6, "bound": 2e-5, "wrong_bits": []}
    bad = [good | {"name": "b", "gradients": 1e-3}, good | {"name": "c", "wrong_bits": ["forward: 1 pairs differ"]}]
    assert page.beyond({"rows": [good, *bad, {"name": "d", "why": "not here"}]}) == ["b in fp32", "c in fp32"]
