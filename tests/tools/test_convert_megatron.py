"""Checkpoints of Megatron-LM become run folders, whatever their parallelism, and nothing that they hold is run."""

import os
from argparse import Namespace

import pytest
import torch
from megatron_files import arguments, random_weights, write_distributed, write_ranks
from parity_rows import MODELS
from sameness import MODEL, merge

from llmtrain.config.model import ModelConfig
from llmtrain.convert.megatron_map import to_canonical, to_megatron
from llmtrain.errors import UserError
from llmtrain.tools.convert import main
from llmtrain.tools.model_source import open_source

PLAIN = {"norm": {"placement": "pre"}}
DENSE = merge(MODEL, PLAIN | {"layers": 4})
LATENT = merge(DENSE, {k: v for k, v in MODELS["latent MoE"].items() if k == "attention"})
EXPERTS = merge(DENSE, MODELS["latent MoE"])
MESHES = [
    (DENSE, {}),
    (DENSE, {"tp": 2, "pp": 2}),
    (merge(DENSE, {"tie_embeddings": True}), {"tp": 2, "pp": 2, "virtual": 2, "te": True}),
    (merge(DENSE, {"ffn": {"activation": "gelu", "bias": True}, "attention": {"qkv_bias": True, "out_bias": True}}), {"tp": 2}),
    (LATENT, {"tp": 2, "te": True}),
    (EXPERTS, {"tp": 1, "ep": 2, "te": True}),
    (EXPERTS, {"tp": 2, "pp": 2, "ep": 4}),
]


def checked(folder, weights):
    with open_source(folder) as source:
        assert source.kind == "megatron" and set(source.tensors.names) == set(weights)
        for name, wanted in weights.items():
            assert source.tensors.describe(name) == (tuple(wanted.shape), wanted.dtype)
            assert torch.equal(source.tensors.read(name), wanted), name
        return source.cfg


@pytest.mark.parametrize("model", MODELS)
def test_the_map_goes_both_ways(model):
    cfg = ModelConfig.model_validate(merge(MODEL, MODELS[model]))
    weights = random_weights(cfg)
    back = to_canonical(cfg, to_megatron(cfg, weights, multiple=8))
    assert back.keys() == weights.keys() and all(torch.equal(back[name], weights[name]) for name in weights)


@pytest.mark.parametrize(("model", "mesh"), MESHES, ids=str)
def test_files_of_ranks_are_merged(model, mesh, tmp_path):
    cfg = ModelConfig.model_validate(model)
    weights = random_weights(cfg)
    write_ranks(tmp_path, cfg, weights, **mesh)
    read = checked(tmp_path, weights)
    assert read.attention.kind == cfg.attention.kind and read.ffn.kind == cfg.ffn.kind and read.tie_embeddings == cfg.tie_embeddings
    checked(tmp_path / "iter_0000100", weights)


@pytest.mark.parametrize("model", [DENSE, EXPERTS], ids=["dense", "experts"])
def test_the_distributed_format(model, tmp_path):
    cfg = ModelConfig.model_validate(model)
    weights = random_weights(cfg)
    write_distributed(tmp_path / "iter_0000007", cfg, weights)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("7\n")
    checked(tmp_path, weights)


def test_the_verb_makes_a_run_folder(tmp_path, capsys):
    cfg = ModelConfig.model_validate(DENSE)
    weights = random_weights(cfg)
    write_ranks(tmp_path / "in", cfg, weights, tp=2)
    assert main([str(tmp_path / "in"), str(tmp_path / "run"), "--to", "native"]) == 0
    with open_source(tmp_path / "run") as source:
        assert source.kind == "native" and all(torch.equal(source.tensors.read(name), tensor) for name, tensor in weights.items())
    assert main([str(tmp_path / "in"), str(tmp_path / "hf"), "--to", "hf"]) == 0
    with pytest.raises(UserError, match="none of them"):
        main([str(tmp_path), str(tmp_path / "other"), "--to", "native"])


class Asked:
    """What a file asks for when it is read: a call of `call`."""

    def __init__(self, call, *given):
        self.wanted = call, given

    def __reduce__(self):
        return self.wanted


def ran(folder):
    """A function of this module that a file must not get to call."""
    os.mkdir(folder)


def test_nothing_in_a_file_is_run(tmp_path):
    cfg = ModelConfig.model_validate(DENSE)
    write_ranks(tmp_path / "in", cfg, random_weights(cfg))
    file, made = tmp_path / "in/iter_0000100/mp_rank_00/model_optim_rng.pt", tmp_path / "made"
    state = torch.load(file, weights_only=False)
    torch.save(state | {"rng_state": Asked(ran, str(made))}, file)
    with open_source(tmp_path / "in") as source:
        assert source.tensors.names and not made.exists()
    torch.save(state | {"rng_state": Asked(os.mkdir, str(made))}, file)
    with pytest.raises(UserError, match=r"model_optim_rng.pt cannot be read: .*mkdir"), open_source(tmp_path / "in"):
        pass
    assert not made.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state["model"].pop("output_layer.weight"), "lacks output_layer.weight"),
        (lambda state: state["model"].update({"decoder.layers.0.odd.weight": torch.zeros(1)}), r"holds decoder.layers.0.odd.weight"),
        (lambda state: state.update(model={"language_model": {}}), "--use-mcore-models"),
        (lambda state: state.pop("args"), "no `args`"),
        (lambda state: state.update(args=Namespace(**vars(state["args"]) | {"squared_relu": True})), "cannot be imported: --squared-relu"),
    ],
)
def test_what_cannot_be_read_is_said(change, message, tmp_path):
    cfg = ModelConfig.model_validate(DENSE)
    write_ranks(tmp_path, cfg, random_weights(cfg))
    file = tmp_path / "iter_0000100/mp_rank_00/model_optim_rng.pt"
    state = torch.load(file, weights_only=False)
    change(state)
    torch.save(state, file)
    with pytest.raises(UserError, match=message), open_source(tmp_path):
        pass


def test_gammas_that_are_stored_less_one(tmp_path):
    cfg = ModelConfig.model_validate(DENSE)
    weights = random_weights(cfg)
    write_ranks(tmp_path, cfg, weights)
    file = tmp_path / "iter_0000100/mp_rank_00/model_optim_rng.pt"
    torch.save(torch.load(file, weights_only=False) | {"args": arguments(cfg, apply_layernorm_1p=True)}, file)
    with open_source(tmp_path) as source:
        assert torch.equal(source.tensors.read("final_norm.weight"), weights["final_norm.weight"] + 1)
        assert torch.equal(source.tensors.read("head.weight"), weights["head.weight"])
