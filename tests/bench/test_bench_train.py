"""bench/train.py runs: llmtrain alone, in a tiny shape."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHAPE = {"vocab": 64, "dim": 32, "layers": 1, "heads": 2, "ffn": 64, "seq": 32, "batch": 2}
TINY = ["--only", "us", "--threads", "1", "--warmup", "1", "--steps", "2"]
TINY += [word for name, value in SHAPE.items() for word in (f"--{name}", str(value))]


def bench(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "bench/train.py"), *TINY, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)


def rows(path: Path) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in path.read_text().splitlines() if line.startswith("| **llm")]


def test_speed_tables(tmp_path):
    out = tmp_path / "speed.md"
    done = bench("--rounds", "2", "--mode", "eager", "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "## fp32, eager" in out.read_text() and "## bf16, eager" in out.read_text()
    for _, tokens, _, _, share, _, _, losses, *_ in rows(out):
        first, last = map(float, losses.split(","))
        assert 4.0 < first < 4.4 and last < first  # ln 64 is 4.16
        assert float(tokens.replace(",", "")) > 0 and share.endswith("%)")
    assert len(rows(out)) == 2


def test_memory_table(tmp_path):
    out = tmp_path / "memory.md"
    done = bench("--memory", "--dtype", "fp32", "--vocab", "200000", "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    (row,) = [line.split("|") for line in out.read_text().splitlines() if "**llmtrain**" in line]
    peak, imported, state, above = (float(cell.split()[0].replace(",", "")) for cell in row[4:8])
    assert abs(state - 16 * 200_000 * 2 * 32 / 2**20) < 1
    # 64 tokens x 200,000 logits in fp32 are 49 MiB.
    assert above > 40 and abs(peak - imported - state - above) < 3


def test_a_contender_that_fails_is_reported(tmp_path):
    out = tmp_path / "failed.md"
    done = bench("--rounds", "1", "--mode", "eager", "--dtype", "fp32", "--heads", "5", "--out", str(out))
    assert done.returncode == 1
    assert "failed" in out.read_text() and "attention.heads 5" in out.read_text()


@pytest.mark.parametrize("option", [("--only", "you"), ("--dtype", "fp8"), ("--rounds", "0")])
def test_wrong_options_are_refused(option):
    done = bench(*option)
    assert done.returncode == 1 and option[0] in done.stderr


def test_profile_names_the_products(tmp_path):
    done = bench("--profile", "--dtype", "fp32")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "aten::mm" in done.stdout and "GEMM" in done.stdout.splitlines()[-1]
