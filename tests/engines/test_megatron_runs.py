"""Stages under the engine megatron, as a user starts them: a short fine-tuning on two ranks, and a gradient ascent."""

import json
from functools import partial
from importlib.util import find_spec

import pytest
import worlds
from chat_tokenizer import byte_level
from engine_runs import LINE, MEGATRON_ON_CPU, llmtrain, losses, write_facts

from llmtrain.packages import installed_version

pytestmark = pytest.mark.skipif(installed_version("megatron-core") is None, reason="megatron-core is not installed; make test-engines")
run_world = partial(worlds.run_world, fresh=find_spec("deepspeed") is not None)
BASE = """
name: base
device: cpu
model: {layers: 2, hidden: 64, vocab_size: 400, max_seq_len: 128, attention: {heads: 4, kv_heads: 2}, ffn: {hidden: 128}}
tokenizer: {path: tokenizer}
data: {train: [{path: facts.jsonl, template: chatml}]}
train: {steps: 1, seq_len: 64, global_batch: 2}
checkpoint: {every: 0, export: hf}
"""
TUNE = """
device: cpu
model: {pretrained: runs/base/hf}
data:
  train: [{path: facts.jsonl, template: chatml}]
  validation: [{path: facts.jsonl, template: chatml, name: same}]
optim: {lr: 5e-3}
train: {epochs: 12, seq_len: 32, global_batch: 2, micro_batch: 1, validate_samples: 4, compile: off}
checkpoint: {every: 5, export: hf}
"""


def test_a_fine_tuning_on_two_ranks(tmp_path):
    write_facts(tmp_path)
    (tmp_path / "base.yaml").write_text(BASE)
    (tmp_path / "tune.yaml").write_text(TUNE)
    llmtrain(tmp_path, "train", "-c", "base.yaml")
    llmtrain(tmp_path, "sft", "-c", "tune.yaml", "--name", "native")
    said = llmtrain(tmp_path, "sft", "-c", "tune.yaml", "--name", "theirs", "--parallel.tp", "2", *MEGATRON_ON_CPU)
    assert "engine megatron" in said
    native, theirs = losses(tmp_path / "runs/native"), losses(tmp_path / "runs/theirs")
    assert theirs == pytest.approx(native, rel=1e-3) and theirs[-1] < 0.7 * theirs[0]
    assert losses(tmp_path / "runs/theirs", "validation") == pytest.approx(losses(tmp_path / "runs/native", "validation"), rel=1e-3)
    assert (tmp_path / "runs/theirs/hf/model.safetensors").is_file()


def test_a_gradient_ascent(tmp_path):
    byte_level(tmp_path / "tokenizer")
    rows = [{"text": LINE.format(n, 7 * n) * (1 + n)} for n in range(2)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "news.txt").write_text("\n\n".join(LINE.format(1000 + n, n) * 2 for n in range(5)))
    texts = {"name": "plain", "input": [str(tmp_path / "texts.jsonl")]}
    gap = {"texts": [texts], "evaluate_at": [2], "perplexity": {"texts": [str(tmp_path / "news.txt")], "tokens": 16}}
    values = {"tokenizer": {"path": str(tmp_path / "tokenizer")}, "train": {"seq_len": 32, "steps": 3, "loss_chunk": 16}, "gap": gap}
    values |= {"model": {"layers": 2, "hidden": 32, "max_seq_len": 128, "vocab_size": 400, "attention": {"heads": 4, "kv_heads": 2}}}
    values |= {"precision": "fp32"}
    found = {}
    for engine in ("native", "megatron"):
        cases = [(str(tmp_path / engine), values | {"engine": engine}, None)]
        (found[engine],) = run_world("megatron_world:ascend", 1, args={"cases": cases}, folder=tmp_path)
    assert found["native"]["code"] == found["megatron"]["code"] == 0
    for mine, theirs in zip(found["native"]["lines"], found["megatron"]["lines"]):
        assert flat(theirs) == pytest.approx(flat(mine), rel=1e-4)
    for name, weight in found["native"]["restored"].items():
        assert (found["megatron"]["restored"][name] == weight).all(), "each text begins with the same weights"


def flat(line: dict) -> dict[str, float]:
    """The measured numbers of a line of results, by their path in it."""
    found, left = {}, [("", line)]
    while left:
        path, value = left.pop()
        if isinstance(value, dict):
            left += [(f"{path}.{key}", inner) for key, inner in value.items() if "second" not in key and key != "time"]
        elif isinstance(value, list):
            left += [(f"{path}.{index}", inner) for index, inner in enumerate(value)]
        elif isinstance(value, float):
            found[path] = value
    return found
