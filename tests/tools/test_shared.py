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
    "mixtral": ("mixtral", {"num_key_value_heads": 4}),
    "deepseek": ("deepseek_v3", {"num_hidden_layers": 3, "n_shared_experts": 2}),
    "deepseek, no query rank": ("deepseek_v3", {"q_lora_rank": None, "v_head_dim": 20}),
}
EXPERTS = {"kind": "moe", "experts": 8, "top_k": 2, "hidden": 40, "activation": "gelu", "bias": True, "descend": 16, "shared_experts": 1}
BIGMAC = {"vocab_size": 97, "layers": 2, "hidden": 32, "max_seq_len": 64, "attention": {"heads": 4}, "init": {"std": 0.2}}
BIGMAC |= {"ffn": EXPERTS | {"capacity": {"factor": 1.0}}}
TILES = {"tp 2 in 3 tiles": {"tp": 2, "tp_chunks": 3}, "tp 2, a layer on the host": {"tp": 2, "tp_chunks": 2, "host_layers": "1"}}
DENSE = {
    1: {"one": {}},
    2: {"tp 2": {"tp": 2}, "pp 2": {"pp": 2}} | TILES,
    4: {"tp 4": {"tp": 4}, "tp 2 x pp 2": {"tp": 2, "pp": 2}},
}
SPARSE = {
    1: {"one": {}},
    2: {"tp 2": {"tp": 2}, "ep 2": {"ep": 2}, "tp 2, ep 2": {"tp": 2, "ep": 2}} | TILES,
    4: {"tp 2, ep 4": {"tp": 2, "ep": 4}, "ep 2 x pp 2": {"ep": 2, "pp": 2}},
}
SMALL = SPARSE | {4: {}}
MESHES = {"tied": DENSE, "biases": DENSE, "norms": DENSE}
MESHES |= {"deepseek": SPARSE, "mixtral": SMALL, "deepseek, no query rank": SMALL, "bigmac": SMALL}
SHARED = [(model, mesh) for model, meshes in MESHES.items() for ranks in (2, 4) for mesh in meshes[ranks]]


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """Model -> mesh -> what it answers; one world for each number of ranks."""
    models = {"bigmac": BIGMAC}
    for name, made in FAMILIES.items():
        models[name] = str(hf_models.save(hf_models.make(*made), tmp_path_factory.mktemp("model")))
    found = {name: {} for name in models}
    for ranks in (1, 2, 4):
        args = {"models": models, "meshes": {name: MESHES[name][ranks] for name in models}}
        world = run_world("shared_world:ask", ranks, args=args, folder=tmp_path_factory.mktemp(f"ranks-{ranks}"))
        for name in models:
            found[name] |= world[name]
    return found


@pytest.mark.parametrize("model, mesh", SHARED)
def test_every_mesh_gives_the_same(answers, model, mesh):
    one, shared = answers[model]["one"], answers[model][mesh]
    assert np.abs(shared["logits"] - one["logits"]).max() < 1e-12 * np.abs(one["logits"]).max()
    assert shared["tokens"] == one["tokens"]
    assert shared["loss"] == pytest.approx(one["loss"], rel=1e-12)


@pytest.mark.parametrize("model, mesh", SHARED)
def test_no_rank_holds_the_whole_model(answers, model, mesh):
    assert max(answers[model][mesh]["held"]) < 0.8 * answers[model]["one"]["held"][0]


MIXTRAL = ("mixtral", {"num_key_value_heads": 4, "intermediate_size": 22})


@pytest.mark.parametrize(
    "options, message, made",
    [
        (("--tp", "3"), "parallel.tp 3 does not divide model.attention.heads 4", ("llama", {})),
        (("--pp", "9"), "model.layers 2 is too few for 9 stages", ("llama", {})),
        (("--tp", "0"), "--tp 0 --pp 1 --ep 1: all must be at least 1", ("llama", {})),
        (("--tp", "2", "--prompts", "-"), "--prompts - reads stdin", ("llama", {})),
        (("--ep", "2"), "share experts, and model.ffn.kind dense has none", ("llama", {})),
        (("--ep", "3", "--tp", "2"), "one of --tp and --ep must be a multiple of the other", MIXTRAL),
        (("--ep", "3"), "parallel.ep 3 does not divide model.ffn.experts 4", MIXTRAL),
        (("--tp", "4"), "parallel.etp 4 does not divide model.ffn.hidden 22", MIXTRAL),
        (("--tp-chunks", "2"), "--tp-chunks 2, --tp 1: at least 1, and above 1 with a --tp above 1 alone", ("llama", {})),
        (("--tp", "2", "--timeout", "0"), "--timeout 0: must be above 0", ("llama", {})),
    ],
)
def test_what_cannot_be_shared_is_refused_before_ranks_start(tmp_path, capsys, options, message, made):
    hf_models.save(hf_models.make(*made), tmp_path)
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
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 3, done.stderr
    assert "rank 1 did not arrive at all_reduce of group tp; rank 0 waited there for" in done.stderr
    assert re.search("rank 1 is in no collective; last seen at inference, block 1 forward, .* in _sleep", done.stderr)
    assert "stacks of all threads" not in done.stderr and "Traceback" not in done.stderr
