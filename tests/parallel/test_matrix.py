"""The command behind `make parity`, with invented runs: what it judges, writes, and does when a world of processes ends early."""

import importlib.util
import pickle
from pathlib import Path

import numpy as np
import pytest
from parity_rows import FAULTS, ROWS, references

ROOT = Path(__file__).parents[2]
PATH = Path(__file__).parent / "matrix.py"


@pytest.fixture(scope="module")
def matrix():
    spec = importlib.util.spec_from_file_location("parity_matrix", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(off: float = 0.0, *, expert: int = 1) -> dict:
    """A run whose losses and gradients are off by so much, relatively."""
    gradient = np.ones(4) * (1 + off)
    return {"losses": [4.0 * (1 + off)], "norms": [2.0 * (1 + off)], "gradients": {"w": gradient}, "routing": {"0": {1: (0, expert)}}}


@pytest.fixture
def runs() -> dict:
    """All rows as they should be: exact in float64, 2e-7 off in float32, control 1e-7 off, nudged 1.5e-7; faults far off."""
    found = {}
    for row in [*ROWS, *FAULTS.values()]:
        off = {"control": 1e-7, "nudged": 1.5e-7}
        found |= {name: run(off.get(name.split(" | ")[1].split()[0], 0.0)) for name in references(row)}
        found |= {f"{row.name} | fp64": run(1e-15), f"{row.name} | fp32": run(2e-7)}
    return found | {f"fault {name}": run(0.1) for name in FAULTS}


def command(matrix, monkeypatch, tmp_path, runs, *words: str) -> tuple[int, Path]:
    monkeypatch.setattr(matrix, "run_all", lambda worlds: runs)
    monkeypatch.setattr("sys.argv", ["matrix.py", "--out", str(tmp_path / "parity.md"), *words])
    return matrix.main(), tmp_path / "parity.md"


def test_the_page_has_every_row_and_fault(matrix, monkeypatch, tmp_path, runs):
    code, page = command(matrix, monkeypatch, tmp_path, runs)
    text = page.read_text()
    assert code == 0
    assert text.count("| pass |") == len(ROWS) and f"{len(ROWS)} rows, 0 failed" in text
    assert "| 4 | pp 2 x tp 2 | tied | micro_batch 1 | 1.1e-15 | 1.1e-15 | 1.1e-15 | 1 of 1 | 2.0e-07 | 1.0e-07 | 1.5e-07 | pass |" in text
    assert "Each rank divides by its own target count" in text and text.count("| 1.0e-01 | 1.0e-01 | 1.0e-01 |") == len(FAULTS)


def test_rows_that_the_page_lacks_are_added_to_it(matrix, monkeypatch, tmp_path, runs):
    _, page = command(matrix, monkeypatch, tmp_path, runs)
    fault = f"| {FAULTS['holders'].name} | "
    gone = matrix.line_start(ROWS[3]), fault
    lacking = [line for line in page.read_text().splitlines(keepends=True) if not line.startswith(gone)]
    page.write_text("".join(lacking))
    code, page = command(matrix, monkeypatch, tmp_path, runs, "--missing")
    added = page.read_text().partition("\nRun later, on ")[2]
    assert code == 0 and added.count("| pass |") == 1 and matrix.line_start(ROWS[3]) in added and "1 rows, 0 failed" in added
    assert page.read_text().count("| pass |") == len(ROWS) and fault in added.partition("\n## Broken on purpose\n")[2]


def test_the_page_in_docs_has_no_row_that_failed_or_is_gone(matrix):
    """`make parity` writes it anew after a row was added."""
    text = (ROOT / "docs" / "parity.md").read_text()
    rows = {matrix.line_start(row): row.name for row in ROWS}
    written = [line for line in text.splitlines() if line.endswith("| pass |") or "FAIL" in line]
    assert len(written) > 90 and all(line.endswith("| pass |") and any(line.startswith(start) for start in rows) for line in written)
    missing = [name for start, name in rows.items() if not any(line.startswith(start) for line in written)]
    if missing:
        pytest.skip(f"docs/parity.md is older than {len(missing)} of {len(ROWS)} rows: run `make parity ARGS=--missing`")
    assert [row.name for row in FAULTS.values() if f"\n| {row.name} | " not in text] == []


def test_float32_may_differ_as_far_as_rounding_of_the_initial_weights_takes_it(matrix, monkeypatch, tmp_path, runs):
    row = ROWS[-1]
    runs[f"{row.name} | fp32"] = run(1e-6)
    runs[f"{row.reference} | nudged 3"] = run(3e-7)
    code, page = command(matrix, monkeypatch, tmp_path, runs)
    assert code == 0 and "| 1.0e-06 * | 1.0e-07 | 3.0e-07 | pass |" in page.read_text()


FAILURES = {
    "loss or gradient": ("fp64", run(1e-8)),
    "routing": ("fp64", run(expert=3)),
    "norm": ("fp64", run() | {"norms": [2.0 + 1e-8]}),
    "float32": ("fp32", run(1e-6)),
    "no result": ("fp64", "RuntimeError: a rank died"),
}


@pytest.mark.parametrize("what", FAILURES)
def test_one_row_that_differs_fails_the_command(matrix, monkeypatch, tmp_path, runs, capsys, what):
    row, (kind, found) = ROWS[30], FAILURES[what]
    code, page = command(matrix, monkeypatch, tmp_path, runs | {f"{row.name} | {kind}": found})
    assert code == 1
    assert page.read_text().count("**FAIL**") == 1 and f"failed: {row.name}" in capsys.readouterr().out
    if what == "no result":
        assert "**FAIL** RuntimeError: a rank died" in page.read_text()


def test_a_fault_that_is_not_seen_fails_the_command(matrix, monkeypatch, tmp_path, runs):
    assert command(matrix, monkeypatch, tmp_path, runs | {"fault tp sum": run()})[0] == 1


def test_some_rows_alone_write_nothing(matrix, monkeypatch, tmp_path, runs, capsys):
    code, page = command(matrix, monkeypatch, tmp_path, runs, "--only", "dualpipev")
    assert code == 0 and not page.exists()
    assert capsys.readouterr().out.count("| pass |") == sum("dualpipev" in row.name for row in ROWS) == 4


def test_a_run_that_ends_its_world_is_named_and_the_others_go_on(matrix, monkeypatch, capsys):
    worlds_started = []

    def run_world(target, ranks, *, args, folder, timeout):
        worlds_started.append(list(args["scenarios"]))
        for index, name in enumerate(args["scenarios"]):
            if name == "bad":
                raise AssertionError("rank 1 of 2 ended with 1:\nTraceback\nValueError: what went wrong\n  at the end")
            (Path(args["done"]) / f"{index}.pkl").write_bytes(pickle.dumps((name, run())))

    monkeypatch.setattr(matrix, "run_world", run_world)
    found = matrix.run_all({2: {"first": {}, "bad": {}, "last": {}}})
    assert worlds_started == [["first", "bad", "last"], ["last"]]
    assert found["bad"] == "ValueError: what went wrong" and found["first"]["losses"] == found["last"]["losses"] == [4.0]
    out = capsys.readouterr().out
    assert "bad  FAILED" in out and "100%  ETA  0.0 min  last" in out
