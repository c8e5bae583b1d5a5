"""docs/parity-engines.md: how it is made of what tests print, and that it is up to date. Needs none of the engines."""

from pathlib import Path
from types import SimpleNamespace

import engine_page
import numpy as np
from engine_parity import differences, say
from megatron_rows import ROWS

ROOT = Path(__file__).parents[2]


def run(off: float, norm: float = 1.0) -> dict:
    weights = {"a": np.ones(4), "b": np.ones(4) * (1.0 + off)}
    return {"losses": [4.0, 4.0 * (1.0 + off)], "norms": [norm], "gradients": weights}


def test_a_page_is_made_of_what_tests_print(capsys):
    found = list(differences(run(3e-6), run(0.0), loss=2e-6, norm=1e-6, gradient=1e-5))
    assert [one.measure for one in found if not one.within] == ["loss"] and found[-1].of == "b"
    say("tp 2; GQA", found)
    lines = "zero 1: loss_difference 1.0e-07, control 2.0e-07\n"
    lines += "".join(f"zero 1: {what}_difference 3.0e-07, control 2.0e-07\n" for what in ("gradient", "norm"))
    reports = [
        SimpleNamespace(nodeid="tests/engines/test_megatron.py::test_a_row[tp 2; GQA]", passed=False, capstdout=capsys.readouterr().out),
        SimpleNamespace(nodeid="tests/engines/test_deepspeed_sameness.py::test_two[zero 1]", passed=True, capstdout=lines + "else\n"),
        SimpleNamespace(nodeid="tests/engines/test_megatron_runs.py::test_three", passed=True, capstdout=""),
    ]
    text = engine_page.page(reports)
    assert "2 rows, 1 failed" in text
    assert "| tp 2; GQA | 3.0e-06 | 2.0e-06 | 3.0e-06 | 1.0e-05 | 0.0e+00 | 1.0e-06 | **FAIL** |" in text
    assert "| zero 1 | 1.0e-07 | 1.0e-06 | 3.0e-07 | 1.0e-06 | 3.0e-07 | 1.0e-06 | pass |" in text


def test_the_page_in_docs_has_every_row_of_megatron_and_none_that_failed():
    """`make parity-engines` writes it anew."""
    lines = [line for line in (ROOT / "docs/parity-engines.md").read_text().splitlines() if line.startswith("| ")]
    assert len(lines) > 60 and not any("FAIL" in line for line in lines)
    assert [row.name for row in ROWS if not any(line.startswith(f"| {row.name} |") for line in lines)] == []
