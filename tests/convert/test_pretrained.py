"""`model.pretrained`: shape and tokenizer from the folder, weights into any mesh, each rank reading its own part."""

import json
import shutil

import numpy as np
import pytest
import torch
import yaml
from hf_models import make, ours, save, tokens, weights
from worlds import run_world

from llmtrain.config.errors import ConfigError
from llmtrain.config.load import load, to_yaml
from llmtrain.config.run import RunConfig
from llmtrain.convert.export import export_hf
from llmtrain.convert.hf_read import model_config
from llmtrain.convert.placed import held
from llmtrain.errors import UserError
from llmtrain.ops import Mask
from llmtrain.tools.convert import main as convert

pytest.importorskip("transformers", reason="the models are made by transformers")


COPIES = {"native": "hf", "latent": "deepseek", "mixed": "mixtral"}
"""Run folders, and the Hugging Face folders that they are converted from."""
EXPERTS = {"ep": {"dp_shard": 2, "ep": 2}, "tp": {"tp": 2}, "tp, ep": {"tp": 2, "ep": 2}, "etp": {"tp": 2, "etp": 2}}
SHARED = ["hf shard", "hf replicate", "native shard", "tied shard", "latent ep"]
SHARED += [f"{model} {axes}" for model in ("deepseek", "mixtral") for axes in EXPERTS]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """hf: a sharded Qwen3; tied: a tied Llama; deepseek and mixtral; run folders of them."""
    place = tmp_path_factory.mktemp("pretrained")
    save(make("qwen3", {"head_dim": 16}), place / "hf", shard="20KB")
    save(make("llama", {"tie_word_embeddings": True}), place / "tied")
    save(make("deepseek_v3", {}), place / "deepseek", shard="20KB")
    save(make("mixtral", {}), place / "mixtral", shard="20KB")
    for made, source in COPIES.items():
        assert convert([str(place / source), str(place / made), "--to", "native"]) == 0
    return place


@pytest.fixture(scope="module")
def loaded(place, tmp_path_factory):
    """The same loads by one rank and by two."""
    one = {name: {"pretrained": str(place / name), "parallel": {}} for name in ("hf", "tied", "deepseek", "mixtral", *COPIES)}
    axes = {"shard": {"dp_shard": 2}, "replicate": {"dp_replicate": 2}, **EXPERTS}
    two = {name: one[name.split()[0]] | {"parallel": axes[name.split(maxsplit=1)[1]]} for name in SHARED}
    for name in ("mixtral", "mixed"):
        one[f"{name} bias"] = one[name] | {"ffn": {"router": {"bias_rate": 0.01}, "balance": {"weight": 0.1}}}
    results = {}
    for ranks, scenarios in ((1, one), (2, two)):
        results |= run_world("pretrained_world:load_all", ranks, args={"scenarios": scenarios}, folder=tmp_path_factory.mktemp("world"))
    return results


def stored(place, name):
    """The weights of the Hugging Face folder behind a model, by their keys in a state."""
    return {f"{n}.weight": p.detach().numpy() for n, p in weights(ours(place / COPIES.get(name, name))[1]).items()}


@pytest.mark.parametrize("name", SHARED)
def test_any_mesh_holds_the_stored_weights(loaded, place, name):
    model = name.split()[0]
    expected = stored(place, model)
    for run in (loaded[name], loaded[model]):
        state = run["state"]
        assert {n for n in state if n.endswith(".weight")} == expected.keys()
        assert all(np.array_equal(state[n], weight) for n, weight in expected.items())
        assert state["step"] == 0 and not any(state[n].any() for n in state if n.endswith("exp_avg"))
    np.testing.assert_allclose(loaded[name]["logits"], loaded[model]["logits"], atol=1e-5)


def test_a_rank_reads_its_own_part(loaded):
    for rank in loaded["hf shard"]["reads"]:
        read = dict(rank)
        assert read["model.embed_tokens.weight"] in (49 * 32, 48 * 32) and read["model.layers.0.self_attn.q_proj.weight"] == 32 * 32
    assert dict(loaded["hf"]["reads"][0])["model.embed_tokens.weight"] == 97 * 32
    assert loaded["native shard"]["reads"] == [[], []]
    begun, done = loaded["hf shard"]["said"]
    assert begun.startswith("reading the weights of ") and done.startswith("weights: ") and done.endswith(" s")


def test_a_rank_reads_its_own_experts(loaded):
    """Of 4, and of 8 with a width of 24: whole ones, each rank others; under etp half of each."""
    for name, experts in (("mixtral tp, ep", 4), ("deepseek ep", 8)):
        first, second = ({n for n, _ in rank if ".experts." in n} for rank in loaded[name]["reads"])
        layers = 2 if experts == 4 else 1
        assert len(first) == len(second) == experts // 2 * 3 * layers and not first & second
    for rank in loaded["deepseek etp"]["reads"]:
        assert {size for n, size in rank if ".experts." in n} == {24 * 32 // 2}
        assert sum(".experts." in n for n, _ in rank) == 8 * 3


def test_routers_may_be_given_a_bias(loaded, place):
    for name in ("mixtral bias", "mixed bias"):
        state, expected = loaded[name]["state"], stored(place, "mixtral")
        biases = [n for n in state if n.endswith("router.bias.weight")]
        assert len(biases) == 2 and not any(state[n].any() for n in biases)
        assert all(np.array_equal(state[n], weight) for n, weight in expected.items())
        np.testing.assert_array_equal(loaded[name]["logits"], loaded["mixtral"]["logits"])
        assert "ffn.router.bias_rate 0.01 (pretrained: null)" in loaded[name]["said"][-1]


def test_every_placement(place, tmp_path):
    found = run_world("pretrained_world:placements", 4, args={"folder": str(place / "hf")}, folder=tmp_path)
    assert len(found) == 6 and all(equal for equal, _ in found.values()), found
    assert all(n <= 97 * 32 // 2 + 32 for _, n in found.values()), found


def test_a_tensor_that_holds_nothing_to_load():
    with pytest.raises(ValueError, match="materialise the model"):
        held(torch.empty(3, device="meta"))
    assert held(torch.empty(3, 0)) == [range(3), range(0)]


def test_the_shape_comes_from_the_folder(place):
    run = load(None, ["--model.pretrained", str(place / "hf"), "--model.position.base", "1e6", "--model.init.std", "0.1"])
    assert run.run.model.layers == 2 and run.origin["model.layers"] == f"pretrained {place / 'hf'}"
    assert run.run.model.position.base == 1e6 and run.origin["model.position.base"] == "command line"
    assert RunConfig.model_validate({"model": {"pretrained": str(place / "native")}}).model.model_copy(
        update={"pretrained": None}
    ) == model_config(place / "hf")


CONFLICTS = {
    "layers 3 conflicts with pretrained .*, which has 2; leave layers out": ["--model.layers", "3"],
    "attention.window 4 conflicts": ["--model.attention.window", "4"],
    "tie_embeddings true conflicts": ["--model.tie_embeddings"],
    'norm.placement "sandwich" conflicts': ["--model.norm.placement", "sandwich"],
    "give one of them": ["--model.preset", "llama3_8b"],
    "nowhere: no config.json .*and no config.yaml": ["--model.pretrained", "nowhere"],
}


def test_a_bias_of_routers_may_not_be_taken_away(place):
    with pytest.raises(ConfigError, match=r"ffn\.router\.bias_rate null conflicts"):
        load(None, ["--model.pretrained", str(place / "deepseek"), "--model.ffn.router.bias_rate", "null"])
    words = ["--model.ffn.router.bias_rate", "0.001", "--model.ffn.balance.sequences", "1", "--model.ffn.capacity.factor", "2"]
    words += ["--model.ffn.router.z_loss", "1e-3", "--model.ffn.router.force_balance"]
    ffn = load(None, ["--model.pretrained", str(place / "deepseek"), *words]).run.model.ffn
    assert ffn.experts == 8 and ffn.router.bias_rate == 0.001 and ffn.balance.sequences == 1 and ffn.router.groups == 4


@pytest.mark.parametrize("message", CONFLICTS)
def test_another_shape_is_refused(place, message):
    with pytest.raises(ConfigError, match=message):
        load(None, ["--model.pretrained", str(place / "hf"), *CONFLICTS[message]])


def test_what_may_be_given_beside_it(place):
    words = ["--model.max_seq_len", "128", "--model.position.scaling", "{kind: ntk, factor: 2}", "--model.attention.kv_heads", "2"]
    assert load(None, ["--model.pretrained", str(place / "hf"), *words]).run.model.max_seq_len == 128


def test_a_written_configuration_outlives_the_folder(place, tmp_path):
    shutil.copytree(place / "hf", tmp_path / "hf")
    run = load(None, ["--model.pretrained", str(tmp_path / "hf")]).run
    text = to_yaml(run)
    shutil.rmtree(tmp_path / "hf")
    assert RunConfig.model_validate(yaml.safe_load(text)) == run


def test_a_written_configuration_is_compared_when_weights_are_loaded(place, tmp_path):
    shutil.copytree(place / "hf", tmp_path / "hf")
    values = load(None, ["--model.pretrained", str(tmp_path / "hf")]).run.model_dump()
    config = json.loads((tmp_path / "hf/config.json").read_text())
    (tmp_path / "hf/config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    from types import SimpleNamespace

    from llmtrain.stages.pretrained import load_pretrained

    with pytest.raises(UserError, match=r"model\.norm\.eps 1e-06 conflicts with pretrained .* which has 0\.5"):
        load_pretrained(SimpleNamespace(cfg=RunConfig.model_validate(values)), None)


def test_openpangu_comes_back_and_keeps_its_init(tmp_path):
    from hf_models import empty

    from llmtrain.config.model import ModelConfig
    from llmtrain.model import initialise

    shape = {"vocab_size": 97, "layers": 2, "hidden": 32, "ffn": {"hidden": 48}, "attention": {"heads": 4, "kv_heads": 2}}
    cfg = ModelConfig.model_validate(shape | {"norm": {"placement": "depth_scaled_sandwich", "c_ffn": 0.9}, "max_seq_len": 64})
    model = empty(cfg)
    initialise(model, cfg, 5)
    folder = export_hf(tmp_path / "hf", cfg, model.named_parameters())
    read, back = ours(folder)
    assert read.norm.placement == "sandwich"
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), back.parameters(), strict=True))
    assert torch.equal(model(tokens(), mask=Mask())["logits"], back(tokens(), mask=Mask())["logits"])
    given = {"pretrained": str(folder), "norm": {"placement": "depth_scaled_sandwich"}}
    assert ModelConfig.model_validate(given).norm.placement == "depth_scaled_sandwich"
    with pytest.raises(ValueError, match=r'norm\.placement "pre" conflicts'):
        ModelConfig.model_validate({"pretrained": str(folder), "norm": {"placement": "pre"}})
