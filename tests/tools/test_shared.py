"""A model shared by several ranks answers as one rank does: logits, losses, and tokens generated with a cache."""

import json
import os
import re
import subprocess
import sys

import hf_models
import numpy as np
import pytest
from hang_runs import LAUNCHER, ROOT, WORLD
from worlds import run_world

from llmtrain.cli import main
from llmtrain.data.token_file import TokenWriter

FAMILIES = {
    "tied": ("llama", {"tie_word_embeddings": True, "num_hidden_layers": 3}),
    "biases": ("qwen2", {"num_hidden_layers": 3, "num_key_value_heads": 1}),
    "norms": ("qwen3", {"num_hidden_layers": 3}),
}
MESHES = {1: {"one": {}}, 2: {"tp 2": {"tp": 2}, "pp 2": {"pp": 2}}, 4: {"tp 4": {"tp": 4}, "tp 2 x pp 2": {"tp": 2, "pp": 2}}}
SHARED = [name for ranks, meshes in MESHES.items() if ranks > 1 for name in meshes]


@pytest.fixture(scope="module", params=FAMILIES)
def answers(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    hf_models.save(hf_models.make(*FAMILIES[request.param]), folder)
    found = {}
    for ranks, meshes in MESHES.items():
        args = {"folder": str(folder), "meshes": meshes}
        found |= run_world("shared_world:ask", ranks, args=args, folder=tmp_path_factory.mktemp(f"ranks-{ranks}"))
    return found


def test_every_mesh_gives_the_same(answers):
    one = answers["one"]
    for name in SHARED:
        assert np.abs(answers[name]["logits"] - one["logits"]).max() < 1e-12 * np.abs(one["logits"]).max(), name
        assert answers[name]["tokens"] == one["tokens"], name
        assert answers[name]["loss"] == pytest.approx(one["loss"], rel=1e-12), name


def test_no_rank_holds_the_whole_model(answers):
    whole = answers["one"]["held"][0]
    for name in SHARED:
        assert max(answers[name]["held"]) < 0.8 * whole, name


@pytest.mark.parametrize(
    "options, message",
    [
        (("--tp", "3"), "parallel.tp 3 does not divide model.attention.heads 4"),
        (("--pp", "9"), "model.layers 2 is too few for 9 stages"),
        (("--tp", "0"), "--tp 0 --pp 1: both must be at least 1"),
        (("--tp", "2", "--prompts", "-"), "--prompts - reads stdin"),
        (("--tp", "2", "--timeout", "0"), "--timeout 0: must be above 0"),
    ],
)
def test_what_cannot_be_shared_is_refused_before_ranks_start(tmp_path, capsys, options, message):
    hf_models.save(hf_models.make("llama", {}), tmp_path)
    assert main(["generate", str(tmp_path), "-p", "x", *options]) == 1
    assert message in capsys.readouterr().err


def test_a_rank_that_does_not_arrive_is_named(tmp_path):
    hf_models.save(hf_models.make("llama", {}), tmp_path / "model")
    with TokenWriter(tmp_path / "tokens", np.uint16) as writer:
        writer.add(np.arange(200) % 97)
    fault = {"act": "sleep", "axis": "tp", "rank": 1, "step": 0, "op": "all_reduce", "inside": "attention_output", "nth": 2}
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    env |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "LLMTRAIN_FAULT": json.dumps(fault)}
    words = ("eval", "model", "perplexity", "tokens", "--context", "32", "--tp", "2", "--timeout", "4", "--device", "cpu")
    command = [sys.executable, "-c", LAUNCHER, str(WORLD), "2", str(tmp_path / "log"), *words]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 3, done.stderr
    assert "rank 1 did not arrive at all_reduce of group tp; rank 0 waited there for" in done.stderr
    assert re.search("rank 1 is in no collective; last seen at inference, block 1 forward, .* in _sleep", done.stderr)
    assert "stacks of all threads" not in done.stderr and "Traceback" not in done.stderr
