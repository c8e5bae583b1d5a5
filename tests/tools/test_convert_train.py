"""Training on from an existing model, as a user starts it: fresh, resumed, from a converted run, and back out."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hf_models import make, save
from safetensors.torch import load_file

from llmtrain import cli
from llmtrain.data.token_file import TokenWriter
from llmtrain.tools.convert import main as convert

pytest.importorskip("transformers", reason="the model is made by transformers")
ROOT = Path(__file__).parents[2]
BASE = """
device: cpu
data: {train: [words]}
optim: {lr: 1.0e-3}
train: {steps: 4, seq_len: 32, global_batch: 4, micro_batch: 2}
checkpoint: {every: 2, export: hf}
"""


class Place:
    """A folder with a model `hf`, its conversion `native`, tokens, and configurations that start from them."""

    def __init__(self, folder: Path):
        self.folder = folder
        save(make("llama", {"max_position_embeddings": 64}), folder / "hf")
        (folder / "hf/generation_config.json").write_text('{"eos_token_id": [3, 5]}')
        assert convert([str(folder / "hf"), str(folder / "native"), "--to", "native"]) == 0
        rng = np.random.default_rng(0)
        with TokenWriter(folder / "words", np.uint16) as words:
            for _ in range(40):
                words.add(rng.integers(0, 97, 50))
        (folder / "base.yaml").write_text(BASE)

    def train(self, name: str, *words: str, code: int = 0) -> tuple[Path, str]:
        """(run folder, output) of `llmtrain train`."""
        env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
        command = [sys.executable, "-m", "llmtrain", "train", "-c", "base.yaml", "--name", name, *words]
        done = subprocess.run(command, cwd=self.folder, env=env, capture_output=True, text=True, timeout=600, stdin=subprocess.DEVNULL)
        assert done.returncode == code, done.stdout + done.stderr
        return self.folder / "runs" / name, done.stdout + done.stderr

    def losses(self, run: Path) -> list[float]:
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        return [line["loss"] for line in lines if line["kind"] == "train"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return Place(tmp_path_factory.mktemp("train"))


@pytest.fixture(scope="module")
def straight(place):
    return place.train("straight", "--model.pretrained", "hf")


def expected_first_loss(place) -> float:
    """Loss of the stored model on the tokens of step 1, by transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    from llmtrain.config.load import load
    from llmtrain.layout.steps import StepPlan
    from llmtrain.stages.pretrain import inputs

    cfg = load(
        place.folder / "base.yaml", ["--model.pretrained", str(place.folder / "hf"), "--data.train", str(place.folder / "words")]
    ).run
    batch = inputs(cfg).dataset_of(StepPlan.from_config(cfg).phases[0]).batch(0, 4)
    model = AutoModelForCausalLM.from_pretrained(place.folder / "hf", dtype=torch.float32)
    total, count = 0.0, 0
    with torch.no_grad():
        for row, targets, lengths in zip(batch.tokens, batch.targets, batch.documents):
            for tokens, wanted in zip(row.split(lengths), targets.split(lengths)):
                loss = torch.nn.functional.cross_entropy(model(tokens[None]).logits[0], wanted, ignore_index=-100, reduction="sum")
                total, count = total + loss.item(), count + int((wanted != -100).sum())
    return total / count


def test_the_first_step_sees_the_stored_weights(place, straight):
    run, out = straight
    assert "weights: hf, read in " in out
    assert place.losses(run)[0] == pytest.approx(expected_first_loss(place), rel=1e-5)


def test_two_ranks_are_one(place, straight):
    run, _ = place.train("two", "--model.pretrained", "hf", "--parallel.dp_shard", "2")
    np.testing.assert_allclose(place.losses(run), place.losses(straight[0]), rtol=1e-5)


def test_from_a_run_folder_and_from_the_run_folder_itself(place, straight):
    run, out = place.train("from-native", "--model.pretrained", "native")
    assert "weights: native, read in " in out
    np.testing.assert_allclose(place.losses(run), place.losses(straight[0]), rtol=1e-6)
    there = ["train", "-c", "native/config.yaml", "--device", "cpu", "--data.train", "words", "--train.steps", "4"]
    there += ["--train.seq_len", "32", "--train.global_batch", "4", "--train.micro_batch", "2", "--optim.lr", "1e-3"]
    command = [sys.executable, "-m", "llmtrain", *there]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=place.folder, env=env, capture_output=True, text=True, timeout=600, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    assert "resumed from step 0" in done.stdout
    np.testing.assert_allclose(place.losses(place.folder / "native"), place.losses(straight[0]), rtol=1e-6)


def test_a_run_that_resumes_does_not_need_the_folder(place, straight):
    (place.folder / "hf").rename(place.folder / "hf2")
    try:
        run, _ = place.train("once", "--model.pretrained", "hf2", "--train.steps", "2", "--schedule.kind", "constant")
        (place.folder / "hf2").rename(place.folder / "gone")
        config = place.folder / "runs/once/config.yaml"
        words = ["-c", str(config)]
        env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "llmtrain", "train", *words, "--train.steps", "4"]
        done = subprocess.run(command, cwd=place.folder, env=env, capture_output=True, text=True, timeout=600, stdin=subprocess.DEVNULL)
        assert done.returncode == 0, done.stderr
        assert "resumed from step 2" in done.stdout and "weights:" not in done.stdout.replace("weights:    ", "")
        assert len(place.losses(run)) == 4
    finally:
        (place.folder / "gone").rename(place.folder / "hf")


def test_what_a_trained_model_gives_back(place, straight):
    run, _ = straight
    before, after = load_file(place.folder / "hf/model.safetensors"), load_file(run / "hf/model.safetensors")
    assert before.keys() == after.keys()
    moved = [(after[name] - before[name]).abs().max().item() for name in before]
    assert 0 < max(moved) < 0.01


def test_experts_are_trained_on_and_come_back(place):
    """From a DeepSeek-V3, by two ranks that share its experts: biases move, and checkpoint and export agree, with transformers too."""
    save(make("deepseek_v3", {}), place.folder / "deepseek")
    words = ["--parallel.dp_shard", "2", "--parallel.ep", "2", "--model.ffn.router.bias_rate", "0.01", "--model.ffn.balance.sequences", "1"]
    run, out = place.train("experts", "--model.pretrained", "deepseek", *words, "--train.steps", "2")
    assert "ffn.router.bias_rate 0.01 (pretrained: 0.0)" in out
    before, after = load_file(place.folder / "deepseek/model.safetensors"), load_file(run / "hf/model.safetensors")
    assert before.keys() == after.keys()
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    assert 0.009 < (after[bias] - before[bias]).abs().max() < 0.021
    assert all((after[name] != before[name]).any() for name in before)
    assert convert([str(run), str(place.folder / "verified"), "--to", "hf", "--verify"]) == 0
    again = load_file(place.folder / "verified/model.safetensors")
    assert all((again[name] == after[name]).all() for name in after)


def test_what_cannot_be_exported_is_refused_before_it_is_trained(place, monkeypatch, capsys):
    monkeypatch.chdir(place.folder)
    shape = ["--model.vocab_size", "97", "--model.layers", "1", "--model.hidden", "32", "--model.attention.heads", "2"]
    assert cli.main(["train", "-c", "base.yaml", "--name", "no", *shape, "--model.norm.kind", "layer_norm"]) == 1
    assert "no Hugging Face family here computes model.norm.kind layer_norm" in capsys.readouterr().err
    assert not (place.folder / "runs/no").exists()


def test_the_rope_base_is_that_of_the_phase_a_checkpoint_ends_in(place):
    phases = "[{steps: 1}, {steps: 1, rope_base: 5.0e4}]"
    words = ["--train.steps", "null", "--train.phases", phases, "--checkpoint.every", "1", "--checkpoint.export", "none"]
    run, _ = place.train("phases", "--model.pretrained", "hf", *words)
    for path, base in ((run, 5e4), (run / "checkpoints/step-00000001", 1e4)):
        assert convert([str(path), str(place.folder / "out"), "--to", "hf", "--force"]) == 0
        assert json.loads((place.folder / "out/config.json").read_text())["rope_theta"] == base


def test_dry_run(place):
    _, out = place.train("dry", "--model.pretrained", "hf", "--dry-run")
    assert "built on meta: 21,728 parameters" in out
