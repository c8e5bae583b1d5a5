"""examples/metaladder at toy size, end to end: formats, targets, stops and rounds; not what is learnt."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_small_run(tmp_path):
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, str(ROOT / "examples/metaladder/run.py"), "--small", "--output", str(tmp_path), "--device", "cpu"]
    arms = ["--arms", "cot_tokens", "metaladder"]
    done = subprocess.run([*command, *arms], env=env, capture_output=True, text=True, timeout=600, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert "mechanics: formats, targets, stops and rounds are as they should be" in done.stdout
    text = (tmp_path / "results.md").read_text()
    assert text.count("| shortcut |") == 2 and text.count("| plain |") == 3 and "| MetaLadder | 66.2 |" in text
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert list(rows) == ["CoT, equal tokens", "MetaLadder", "MetaLadder + self-evolve"]


def test_what_solutions_get_wrong(tmp_path):
    sys.path.append(str(ROOT / "examples/metaladder"))
    from solution_sums import shares

    problem = {"id": "1", "question": "q", "solution": "2 + 3 = 5, 5 * 2 = 10. The answer is 10.", "answer": "10"}
    (tmp_path / "problems.jsonl").write_text(json.dumps(problem))
    analogy = "Similar Problem:\n9 + 9 = 1\n\nSolution to the Original Problem:\n"
    texts = (analogy + "2 + 3 = 5", "2 + 3 = 6", "3 + 3 = 6", "no sum")
    (tmp_path / "answers.json").write_text(json.dumps({"answers": [{"id": "1", "text": text} for text in texts]}))
    assert shares(tmp_path / "answers.json", tmp_path / "problems.jsonl") == (0.5, 0.5)
