"""Whole runs under engine deepspeed, as a user starts them: fine-tuning, Gradient Ascent Post-training, a run that changes engines, and
what is said when it cannot start."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from engine_runs import LINE, MEGATRON_ON_CPU, TOY, llmtrain, losses, write_facts
from worlds import run_world

from llmtrain.compat import extension_folder
from llmtrain.packages import installed_version

pytestmark = pytest.mark.deepspeed
TUNE = """
device: cpu
model: {pretrained: runs/base/hf}
data: {train: [{path: facts.jsonl, template: chatml}], validation: [{path: facts.jsonl, template: chatml, name: same}]}
optim: {lr: 5.0e-3}
schedule: {kind: constant}
train: {steps: 16, seq_len: 32, global_batch: 4, micro_batch: 1, validate_samples: 4}
checkpoint: {every: 0, export: hf}
"""
WHOLE = "{zero_optimization: {stage3_param_persistence_threshold: 0}}"


def worst(a: list[float], b: list[float]) -> float:
    return max(abs(x - y) / y for x, y in zip(a, b, strict=True))


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A toy model with weights, facts to teach it, and a run of the native engine that does."""
    place = tmp_path_factory.mktemp("runs")
    write_facts(place)
    (place / "toy.yaml").write_text(TOY)
    (place / "tune.yaml").write_text(TUNE)
    llmtrain(place, "train", "-c", "toy.yaml")
    llmtrain(place, "sft", "-c", "tune.yaml", "--name", "native")
    return place


@pytest.mark.parametrize("stage", ["2", "3"])
def test_fine_tuning_is_that_of_the_native_engine(place, stage):
    import safetensors.numpy

    name = f"zero-{stage}"
    engine = ("--engine", "deepspeed", "--engine.zero", stage, "--engine.options", WHOLE if stage == "3" else "{}")
    said = llmtrain(place, "sft", "-c", "tune.yaml", "--name", name, *engine, "--parallel.dp_shard", "2")
    assert re.search(r"^mesh: dp_shard 2 \(gloo\), engine deepspeed$", said, re.MULTILINE) and "validation loss on same: " in said
    found, native = losses(place / "runs" / name), losses(place / "runs/native")
    assert worst(found, native) < 1e-4 and found[-1] < found[0] / 3
    mine, theirs = (safetensors.numpy.load_file(place / "runs" / run / "hf/model.safetensors") for run in (name, "native"))
    assert mine.keys() == theirs.keys()
    for tensor, weights in theirs.items():
        np.testing.assert_allclose(mine[tensor], weights, atol=5e-3, err_msg=tensor)


def test_a_run_changes_its_engine_on_the_way(place):
    tune = ("sft", "-c", "tune.yaml", "--name", "moved", "--checkpoint.export", "none", "--train.steps")
    llmtrain(place, *tune, "6")
    said = llmtrain(place, *tune, "11", "--engine", "deepspeed", "--engine.zero", "2", "--parallel.dp_shard", "2")
    assert "resumed from step 6" in said
    last = 11
    if installed_version("megatron-core") is not None:
        said = llmtrain(place, *tune, "14", *MEGATRON_ON_CPU, "--parallel.tp", "2", "--train.compile", "off")
        assert f"resumed from step {last}" in said and "engine megatron" in said
        last = 14
    said = llmtrain(place, *tune, "16", "--parallel.dp_shard", "2")
    assert f"resumed from step {last}" in said and "engine native" in said
    assert worst(losses(place / "runs/moved"), losses(place / "runs/native")) < 1e-4


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> dict:
    """What Gradient Ascent Post-training is given."""
    from tokenizers import ByteLevelBPETokenizer

    place = tmp_path_factory.mktemp("gap")
    library = ByteLevelBPETokenizer()
    library.train_from_iterator([LINE.format(n, n * n) for n in range(50)], vocab_size=300, special_tokens=["<|endoftext|>"])
    library.save(str(place / "tokenizer.json"))
    (place / "texts.jsonl").write_text("".join(json.dumps({"text": LINE.format(n, 7 * n) * (1 + n)}) + "\n" for n in range(3)))
    (place / "news.txt").write_text("\n\n".join(LINE.format(1000 + n, n) * 2 for n in range(4)))
    gap = {"texts": [{"name": "plain", "input": [str(place / "texts.jsonl")]}], "evaluate_at": [4]}
    gap |= {"perplexity": {"texts": [str(place / "news.txt")], "tokens": 16}}
    tokenizer = {"path": str(place / "tokenizer.json")}
    return {"tokenizer": tokenizer, "train": {"seq_len": 32, "steps": 4}, "optim": {"lr": 1e-3}, "gap": gap, "precision": "fp32"}


def test_gradient_ascent_starts_every_text_from_the_same_weights(texts, tmp_path):
    zeros = {f"zero {stage}": {"engine": {"kind": "deepspeed", "zero": stage}, "parallel": {"dp_shard": 2}} for stage in (2, 3)}
    cases = [(str(tmp_path / name), texts | changes, None) for name, changes in zeros.items()]
    (native,) = run_world("gap_world:sweeps", 1, args={"cases": [(str(tmp_path / "native"), texts, None)]}, folder=tmp_path)
    wanted = [line for line in native["lines"] if line["kind"] == "run"]
    for name, found in zip(zeros, run_world("gap_world:sweeps", 2, args={"cases": cases}, folder=tmp_path), strict=True):
        runs = [line for line in found["lines"] if line["kind"] == "run"]
        assert found["code"] == 0 and len(runs) == 3
        for mine, theirs in zip(runs, wanted, strict=True):
            assert mine["losses"] == pytest.approx(theirs["losses"], rel=1e-5), name
            assert mine["losses"][-1] > mine["losses"][0]
            assert mine["steps"]["4"]["nats news"] == pytest.approx(theirs["steps"]["4"]["nats news"], rel=1e-4), name
        for weight, kept in native["restored"].items():
            assert np.array_equal(found["restored"][weight], kept), f"{name}: {weight} is not what it was"


# --- what is said when it cannot start ------------------------------------------------------------------------------------------------

START = ("sft", "-c", "tune.yaml", "--name", "never", "--engine", "deepspeed")


def test_what_it_cannot_run_is_said_in_one_line_before_ranks_start(place):
    said = llmtrain(place, *START, "--parallel.tp", "2", code=1)
    assert said.strip().endswith("engine deepspeed: parallel.tp is 2, but it runs only dp_replicate, dp_shard; engine native has tp")
    assert "Traceback" not in said and not (place / "runs/never").exists()


def test_the_lock_of_a_killed_build_is_said_by_every_rank_at_once(place, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = extension_folder("deepspeed_shm_comm") / "lock"
    lock.touch()
    said = llmtrain(place, *START, "--parallel.dp_shard", "2", code=1)
    assert f"{lock} has been there for" in said and f"rm {lock}" in said and "Traceback" not in said


def test_a_missing_compiler_is_said(place, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    said = llmtrain(place, *START, code=1, CXX="no-such-compiler")
    assert "there is no C++ compiler no-such-compiler (CXX names another)" in said and "Traceback" not in said
