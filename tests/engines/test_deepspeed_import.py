"""A model that DeepSpeed trained by itself, its checkpoint made universal by DeepSpeed, goes on here as it would have gone on there."""

import subprocess
import sys

import pytest
from hf_models import make
from worlds import run_world

from llmtrain.cli import main

pytestmark = pytest.mark.deepspeed
STEPS, MORE = 3, 4


@pytest.mark.parametrize(("family", "changes", "stage"), [("llama", {}, 2), ("qwen2", {"tie_word_embeddings": True}, 3)])
def test_training_goes_on_from_deepspeeds_checkpoint(family, changes, stage, tmp_path):
    pytest.importorskip("transformers", reason="it is the model that DeepSpeed trains")
    theirs = tmp_path / "theirs"
    args = {"family": family, "changes": changes, "stage": stage, "folder": str(theirs), "steps": STEPS, "more": MORE}
    expected = run_world("their_zero:train", 2, args=args, folder=tmp_path)
    made = f"global_step{STEPS}"
    words = ["--inject_missing_state", "--input_folder", str(theirs / made), "--output_folder", str(theirs / f"{made}_universal")]
    words += ["--num_extract_workers", "1", "--num_merge_workers", "1"]
    subprocess.run([sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", *words], check=True, capture_output=True, cwd=tmp_path)
    make(family, changes).config.save_pretrained(theirs)
    run = tmp_path / "mine"
    assert main(["convert", str(theirs / f"{made}_universal"), str(run), "--to", "native"]) == 0
    taken, found = run_world("their_zero:go_on", 1, args={"run": str(run), "steps": STEPS, "more": MORE}, folder=tmp_path)
    assert taken == STEPS
    assert found == pytest.approx(expected, rel=1e-4)
    assert expected[-1] != pytest.approx(expected[0], rel=1e-3), "the model does not move"
