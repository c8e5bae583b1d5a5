"""Exported folders load in transformers and give the same logits."""

import json
from types import SimpleNamespace

import pytest
import torch
from hf_models import empty, weights
from safetensors import safe_open
from safetensors.torch import load_file

from llmtrain.config.model import ModelConfig
from llmtrain.config.published import PRESETS
from llmtrain.convert.export import export_hf
from llmtrain.convert.families import FAMILIES, pick_family
from llmtrain.convert.names import counterparts, from_hf, to_hf
from llmtrain.convert.reading import read_whole
from llmtrain.errors import UserError
from llmtrain.model import initialise
from llmtrain.ops import Mask

transformers = pytest.importorskip("transformers", reason="the export is checked against transformers")
SMALL = {"vocab_size": 97, "layers": 2, "hidden": 32, "ffn": {"hidden": 48}, "init": {"std": 0.2}, "max_seq_len": 64}
MOE = {"kind": "moe", "experts": 4, "top_k": 2, "hidden": 24}
SIGMOID = {"score": "sigmoid", "scale": 1.5, "groups": 2, "top_groups": 1}
LATENT = {"kind": "mla", "heads": 4, "kv_rank": 16, "nope_dim": 8, "rope_dim": 4, "value_dim": 6, "norm_eps": 1e-6}
YARN = {"kind": "yarn", "factor": 4, "original_seq_len": 16}
CASES = {
    "llama": {"attention": {"heads": 4, "kv_heads": 2}},
    "llama tied": {"attention": {"heads": 4, "kv_heads": 1}, "tie_embeddings": True},
    "llama head dim": {"attention": {"heads": 4, "head_dim": 16}, "position": {"base": 5e5}},
    "llama31 rope": {"attention": {"heads": 4}, "position": {"scaling": {"kind": "llama3", "original_seq_len": 16}}},
    "llama yarn": {"attention": {"heads": 4}, "position": {"scaling": {"kind": "yarn", "factor": 4, "original_seq_len": 16}}},
    "llama ntk": {"attention": {"heads": 4}, "position": {"scaling": {"kind": "ntk", "factor": 4}}},
    "llama biases": {"attention": {"heads": 4, "qkv_bias": True, "out_bias": True}, "ffn": {"hidden": 48, "bias": True}},
    "qwen3 biases": {"attention": {"heads": 4, "qkv_bias": True, "out_bias": True, "qk_norm": True}},
    "qwen2": {"attention": {"heads": 4, "kv_heads": 2, "qkv_bias": True}, "norm": {"eps": 1e-6}},
    "qwen3": {"attention": {"heads": 4, "kv_heads": 2, "qk_norm": True, "head_dim": 16}, "norm": {"eps": 1e-6}},
    "mixtral": {"attention": {"heads": 4, "kv_heads": 2, "window": 9}, "ffn": MOE | {"capacity": {"factor": 4}}},
    "qwen3_moe": {"attention": {"heads": 4, "qk_norm": True}, "ffn": MOE | {"dense_layers": 1, "router": {"renormalise": False}}},
    "deepseek_v3": {"attention": LATENT, "ffn": MOE | {"router": SIGMOID | {"bias_rate": 0.001}, "shared_experts": 1}},
    "deepseek_v3 no bias": {"attention": LATENT | {"query_rank": 12}, "ffn": MOE | {"router": SIGMOID}},
    "deepseek_v3 ntk": {"attention": LATENT, "position": {"scaling": {"kind": "ntk", "factor": 4}}},
    "deepseek_v3 scale": {"attention": LATENT | {"softmax_scale": 0.41}, "position": {"scaling": YARN | {"attention_factor": 1.2}}},
}


def model_of(values: dict):
    cfg = ModelConfig.model_validate(SMALL | values)
    model = empty(cfg)
    initialise(model, cfg, 3)
    with torch.no_grad():  # biases and norms away from 0 and 1, or a mix-up would not show
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.linspace(-0.3, 0.3, parameter.numel()) + 0.01 * len(name))
        for buffer in model.buffers():
            buffer.add_(torch.linspace(0.1, -0.1, buffer.numel()))
    return cfg, model


@pytest.mark.parametrize("shard_bytes", [5_000_000_000, 20_000])
@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case, shard_bytes, tmp_path):
    cfg, model = model_of(CASES[case])
    assert pick_family(cfg) == case.split()[0].replace("llama31", "llama")
    assert all(torch.isfinite(tensor).all() for tensor in weights(model).values())
    folder = export_hf(tmp_path / "hf", cfg, weights(model).items(), shard_bytes=shard_bytes)
    assert (folder / "model.safetensors.index.json").exists() == (shard_bytes == 20_000)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = torch.randint(0, 97, (2, 48), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, got = theirs(tokens).logits, model(tokens, mask=Mask())["logits"]
    assert expected.std() > 0.1
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_openpangu_names(tmp_path):
    cfg, model = model_of({"norm": {"placement": "depth_scaled_sandwich"}, "attention": {"heads": 4}})
    folder = export_hf(tmp_path / "hf", cfg, model.named_parameters())
    stored = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    assert config["sandwich_norm"] is True
    assert config["bias"] is False and config["attention_bias"] is False  # the first is true by default in openPangu's class
    assert {
        f"model.layers.1.{n}.weight" for n in ("input_layernorm", "post_attention_layernorm", "pre_mlp_layernorm", "post_mlp_layernorm")
    } <= set(stored)
    back = {from_hf(name, "openpangu"): tensor for name, tensor in stored.items()}
    own = dict(model.named_parameters())
    assert back.keys() == own.keys() and all(torch.equal(back[name], own[name]) for name in own)
    assert "from_hf" in (folder / "README.md").read_text()
    with pytest.raises(ValueError, match="PanguEmbedded"):  # rather than a Llama with its norms in the wrong places
        transformers.AutoConfig.from_pretrained(folder)


@pytest.mark.parametrize("preset", [name for name, model in PRESETS.items() if model["ffn"].get("kind") != "moe"])
def test_names_are_invertible(preset):
    cfg = ModelConfig.model_validate({"preset": preset, "layers": 2, "mtp": {"heads": 0}})
    try:
        family = pick_family(cfg)
    except UserError as error:
        pytest.skip(str(error))
    assert_invertible(cfg, family)


def assert_invertible(cfg: ModelConfig, family: str) -> None:
    """Every name in the file stands for one parameter, whose name it gives back."""
    assert family in FAMILIES
    mine = [(name, stored) for name, place in counterparts(cfg, family).items() for stored in place.names]
    assert [from_hf(stored, family) for _, stored in mine] == [name for name, _ in mine]
    assert len({stored for _, stored in mine}) == len(mine)


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith(("mixtral", "qwen3_moe", "deepseek"))])
def test_names_and_layouts_of_experts_are_invertible(case):
    cfg, model = model_of(CASES[case])
    family = pick_family(cfg)
    assert_invertible(cfg, family)
    mine, places = weights(model), counterparts(cfg, family)
    assert mine.keys() == places.keys()
    for name, place in places.items():
        parts = dict(place.split(mine[name].detach()))
        assert tuple(parts) == place.names and {tuple(part.shape) for part in parts.values()} == {place.shape}
        stored = SimpleNamespace(whole=parts.__getitem__)
        assert torch.equal(read_whole(stored, place), mine[name]), name


def test_the_bias_of_a_router_is_not_rounded(tmp_path):
    cfg, model = model_of(CASES["deepseek_v3"])
    folder = export_hf(tmp_path / "hf", cfg, weights(model).items(), dtype=torch.bfloat16)
    stored = load_file(folder / "model.safetensors")
    bias = stored.pop("model.layers.1.mlp.gate.e_score_correction_bias")
    assert torch.equal(bias, model.blocks["1"].ffn.router.bias) and bias.dtype == torch.float32
    assert stored["model.layers.1.mlp.gate.weight"].dtype == torch.bfloat16
    assert json.loads((folder / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_a_router_without_a_bias_has_one_of_zeros_in_the_file(tmp_path):
    cfg, model = model_of(CASES["deepseek_v3 no bias"])
    folder = export_hf(tmp_path / "hf", cfg, weights(model).items())
    assert not load_file(folder / "model.safetensors")["model.layers.0.mlp.gate.e_score_correction_bias"].any()
    with pytest.raises(UserError, match=r"missing \['model.layers.0.mlp.gate.e_score_correction_bias'"):  # one that was forgotten is not
        cfg, model = model_of(CASES["deepseek_v3"])
        export_hf(tmp_path / "no", cfg, model.named_parameters())


REFUSED = {
    "activation gelu": {"ffn": {"activation": "gelu"}},
    "layer_norm": {"norm": {"kind": "layer_norm"}},
    "learned": {"position": {"kind": "learned"}},
    "window": {"attention": {"window": 8}},
    "out_bias without": {"attention": {"out_bias": True}},
    "qkv_bias with qk_norm": {"attention": {"qkv_bias": True, "qk_norm": True}},
    "ffn.bias with qk_norm": {"attention": {"qk_norm": True}, "ffn": {"bias": True}},
    "sandwich with": {"norm": {"placement": "sandwich"}, "attention": {"qk_norm": True}},
    "model.family other": {"family": "other"},
    "model.mtp.heads 2": {"mtp": {"heads": 2}},
    "norm.placement sandwich with a mixture": {"ffn": MOE, "norm": {"placement": "sandwich"}},
    "ffn.descend 8": {"ffn": MOE | {"descend": 8}},
    "ffn.bias of a mixture": {"ffn": MOE | {"bias": True}},
    "router.force_balance": {"ffn": MOE | {"router": {"force_balance": True}}},
    "shared_experts without attention.kind mla": {"ffn": MOE | {"shared_experts": 1}},
    "router.score sigmoid without": {"ffn": MOE | {"router": {"score": "sigmoid"}}},
    "router.scale without": {"ffn": MOE | {"router": {"scale": 2}}},
    "router.top_groups without": {"ffn": MOE | {"router": {"groups": 2}}},
    "router.bias_rate without": {"ffn": MOE | {"router": {"bias_rate": 0}}},
    "qkv_bias or out_bias with experts": {"ffn": MOE, "attention": {"qkv_bias": True, "out_bias": True}},
    "qkv_bias unlike attention.out_bias": {"ffn": MOE, "attention": {"qkv_bias": True, "qk_norm": True}},
    "renormalise false with experts": {"ffn": MOE | {"router": {"renormalise": False}}},
    "dense_layers with experts": {"ffn": MOE | {"dense_layers": 1}},
    "router.score softmax with attention.kind mla": {"ffn": MOE, "attention": LATENT},
    "router.groups 4 of one expert": {"ffn": MOE | {"router": SIGMOID | {"groups": 4, "top_groups": 2}}, "attention": LATENT},
    "attention.window with": {"attention": LATENT | {"window": 8}},
    "softmax_scale without position.scaling yarn": {"attention": LATENT | {"softmax_scale": 1.0}},
    "norm_eps 1e-05 ": {"attention": LATENT | {"norm_eps": None}},
    "ffn.bias with attention.kind mla": {"attention": LATENT, "ffn": {"bias": True}},
}


@pytest.mark.parametrize("option", REFUSED)
def test_what_no_family_computes_is_refused(option):
    with pytest.raises(UserError, match=rf"computes .*{option}.*checkpoint\.export"):
        pick_family(ModelConfig.model_validate(REFUSED[option]))


def test_wrong_weights_are_said(tmp_path):
    cfg, model = model_of(CASES["llama"])
    with pytest.raises(UserError, match=r"missing \['lm_head.weight'\]"):
        export_hf(tmp_path / "hf", cfg, [(n, p) for n, p in model.named_parameters() if n != "head.weight"])
    with pytest.raises(UserError, match=r"not expected \['head.weight'\]"):
        export_hf(tmp_path / "hf", cfg.model_copy(update={"tie_embeddings": True}), model.named_parameters())
    with pytest.raises(UserError, match=r"shapes differ"):
        export_hf(tmp_path / "hf", cfg.model_copy(update={"vocab_size": 98}), model.named_parameters())
    with pytest.raises(ValueError, match=r"lm_head.weight was given twice"):
        export_hf(tmp_path / "hf", cfg, [*model.named_parameters(), ("head.weight", model.head.weight)])
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match=r"no counterpart"):
        to_hf("blocks.0.attention.gate.weight", "llama")


def test_dtype_and_replacement(tmp_path):
    cfg, model = model_of(CASES["llama"])
    export_hf(tmp_path / "hf", cfg, model.named_parameters())
    export_hf(tmp_path / "hf", cfg, model.named_parameters(), dtype=torch.bfloat16)
    assert json.loads((tmp_path / "hf/config.json").read_text())["torch_dtype"] == "bfloat16"
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_failed_export_leaves_the_older_one(tmp_path):
    cfg, model = model_of(CASES["llama"])
    folder = export_hf(tmp_path / "hf", cfg, model.named_parameters())
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(UserError, match="missing"):
        export_hf(folder, cfg, list(model.named_parameters())[1:])
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_the_base_of_the_last_phase_is_what_is_written(tmp_path):
    cfg, model = model_of(CASES["llama"])
    model.set_rope_base(1e5)
    folder = export_hf(tmp_path / "hf", cfg, model.named_parameters(), rope_base=1e5)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = torch.arange(48)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(tokens, mask=Mask())["logits"], theirs(tokens).logits, atol=1e-5, rtol=1e-5)


def test_older_readers_find_the_rope_scaling(tmp_path):
    cfg, model = model_of(CASES["llama yarn"])
    config = json.loads((export_hf(tmp_path / "hf", cfg, model.named_parameters()) / "config.json").read_text())
    assert config["rope_scaling"]["rope_type"] == "yarn" and config["rope_theta"] == 10_000
    # Releases of transformers 4 take the factor from these two.
    assert config["max_position_embeddings"] / config["rope_scaling"]["original_max_position_embeddings"] == 4


def test_a_tied_head_is_written_once(tmp_path):
    cfg, model = model_of(CASES["llama tied"])
    with safe_open(export_hf(tmp_path / "hf", cfg, model.named_parameters()) / "model.safetensors", "pt") as stored:
        assert "lm_head.weight" not in stored.keys() and "model.embed_tokens.weight" in stored.keys()  # noqa: SIM118 (not a dict)
