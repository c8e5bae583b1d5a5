"""Exported folders load in transformers and give the same logits."""

import json

import pytest
import torch
from safetensors import safe_open

from llmtrain.config.model import ModelConfig
from llmtrain.config.published import PRESETS
from llmtrain.convert.export import export_hf
from llmtrain.convert.names import FAMILIES, canonical_names, from_hf, pick_family, to_hf
from llmtrain.errors import UserError
from llmtrain.model import build, initialise
from llmtrain.ops import Call, Mask, resolve

transformers = pytest.importorskip("transformers", reason="the export is checked against transformers")
SMALL = {"vocab_size": 97, "layers": 2, "hidden": 32, "ffn": {"hidden": 48}, "init": {"std": 0.2}, "max_seq_len": 64}
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
}


def model_of(values: dict):
    cfg = ModelConfig.model_validate(SMALL | values)
    call = Call(device="cpu", dtype=torch.float32, head_dim=cfg.head_dim, heads=cfg.attention.heads, kv_heads=cfg.kv_heads)
    model = build(cfg, resolve({}, call), 64)
    initialise(model, cfg, 3)
    with torch.no_grad():  # biases and norms away from 0 and 1, or a mix-up would not show
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.linspace(-0.3, 0.3, parameter.numel()) + 0.01 * len(name))
    return cfg, model


@pytest.mark.parametrize("shard_bytes", [5_000_000_000, 20_000])
@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case, shard_bytes, tmp_path):
    cfg, model = model_of(CASES[case])
    assert pick_family(cfg) == case.split()[0].replace("llama31", "llama")
    folder = export_hf(tmp_path / "hf", cfg, model.named_parameters(), shard_bytes=shard_bytes)
    assert (folder / "model.safetensors.index.json").exists() == (shard_bytes == 20_000)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = torch.randint(0, 97, (2, 48), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, got = theirs(tokens).logits, model(tokens, mask=Mask())["logits"]
    assert expected.std() > 0.1
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_openpangu_names(tmp_path):
    cfg, model = model_of({"norm": {"placement": "depth_scaled_sandwich"}, "attention": {"heads": 4}})
    from safetensors.torch import load_file

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
    cfg = ModelConfig.model_validate({"preset": preset, "layers": 2})
    family = pick_family(cfg)
    assert family in FAMILIES
    names = canonical_names(cfg)
    assert [from_hf(to_hf(name, family), family) for name in names] == names
    assert len({to_hf(name, family) for name in names}) == len(names)


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
    "model.ffn.kind moe": {"ffn": {"kind": "moe"}},
    "model.mtp.heads 2": {"mtp": {"heads": 2}},
}


@pytest.mark.parametrize("option", REFUSED)
def test_what_no_family_computes_is_refused(option):
    with pytest.raises(UserError, match=rf"computes .*{option}.*checkpoint\.export"):
        pick_family(ModelConfig.model_validate(REFUSED[option]))


def test_wrong_weights_are_said(tmp_path):
    cfg, model = model_of(CASES["llama"])
    with pytest.raises(UserError, match=r"missing \['lm_head.weight'\]"):
        export_hf(tmp_path / "hf", cfg, [(n, p) for n, p in model.named_parameters() if n != "head.weight"])
    with pytest.raises(UserError, match=r"not expected \['lm_head.weight'\]"):
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
