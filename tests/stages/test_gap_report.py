"""The report of a sweep against scores whose answer is known."""

import json

import numpy as np
import pytest

from llmtrain.errors import UserError
from llmtrain.stages import gap_report

ITEMS = 40
EVEN = np.arange(ITEMS) % 2 == 0


def run(key: str, *, source: str = "code", ended: str = "done", **steps) -> dict:
    scores = {step.removeprefix("s"): {"dialogue f1": list(map(float, values))} for step, values in steps.items()}
    return {"kind": "run", "key": key, "source": source, "index": 0, "tokens": 9, "ended": ended, "losses": [2.0, 3.0], "steps": scores}


def test_the_held_out_gain_is_that_of_the_step_that_the_other_half_chose():
    base = [10.0] * ITEMS
    lucky = np.where(EVEN, 14.0, 9.0)  # good on the selection half alone
    sound = np.where(EVEN, 12.0, 12.0)
    found = gap_report.gains("dialogue f1", base, [run("a", s5=lucky, s10=sound), run("b", s5=np.full(ITEMS, 8.0))])
    assert found.chosen.tolist() == [5, 0], "the second run stays at the untreated model"
    assert found.held_out.mean(axis=1).tolist() == [-1.0, 0.0], "a chosen step can lose"
    assert found.paper.tolist() == [2.0, 0.0], "the paper's protocol cannot"
    assert found.fixed[5].shape == (2, ITEMS) and found.fixed[10].shape == (1, ITEMS), "runs that reached the step"
    assert gap_report.best_run(base, [run("a", s5=lucky, s10=sound)], "dialogue f1") == ("a", 5)
    assert gap_report.best_run(base, [run("b", s5=np.full(ITEMS, 8.0))], "dialogue f1") == (None, 0)


def test_lower_losses_are_gains():
    base = [3.0] * ITEMS
    better = {"kind": "run", "key": "a", "steps": {"5": {"nats news": [2.5] * ITEMS}}}
    found = gap_report.gains("nats news", base, [better])
    assert found.chosen.tolist() == [5] and found.held_out.mean() == pytest.approx(0.5)


def test_noise_gains_nothing_held_out_but_something_by_the_papers_protocol():
    rng = np.random.default_rng(1)
    base = rng.normal(10, 3, ITEMS)
    runs = [run(str(n), **{f"s{step}": base + rng.normal(0, 3, ITEMS) for step in (5, 10, 15)}) for n in range(60)]
    found = gap_report.gains("dialogue f1", base, runs)
    error = found.held_out.mean(axis=1).std() / np.sqrt(60)
    assert abs(found.held_out.mean()) < 3 * error
    assert found.paper.mean() > 5 * error, "the best of four candidates on the items reported"


def test_the_page_has_both_the_control_and_the_picture(tmp_path):
    rng = np.random.default_rng(2)
    base = {"dialogue f1": [10.0] * ITEMS}
    runs = [run(f"c{n}", s5=10 + rng.normal(2, 1, ITEMS), s10=10 + rng.normal(1, 1, ITEMS)) for n in range(4)]
    runs += [run(f"p{n}", source="prose", s5=10 + rng.normal(0, 1, ITEMS)) for n in range(3)]
    runs.append(run("x", source="prose", ended="diverged: NaN"))
    lines = [{"kind": "setup", "values": {}}, {"kind": "base", "scores": base}, *runs]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = gap_report.write(tmp_path, control="prose")
    assert (tmp_path / "report.md").read_text() == text and (tmp_path / "gap.png").stat().st_size > 5000
    assert "| code | 4 | 4 | 0 | 0 | 2.000 | 3.000 |" in text and "| prose | 4 | 3 | 1 | 0 |" in text
    row = next(line for line in text.splitlines() if line.startswith("| code |") and line.count("|") == 6)
    assert 1.5 < float(row.split("|")[2]) < 2.6, "code less prose"


def test_a_file_without_runs(tmp_path):
    (tmp_path / "results.jsonl").write_text('{"kind": "setup", "values": {}}\n')
    with pytest.raises(UserError, match="holds no finished run"):
        gap_report.load(tmp_path)
    (tmp_path / "results.jsonl").write_text("[]\n")
    with pytest.raises(UserError, match="is no file of results"):
        gap_report.load(tmp_path)
