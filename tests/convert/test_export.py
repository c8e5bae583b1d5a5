"""Exported folders load in transformers and give the same logits."""

import json

import pytest
import torch

from llmtrain.config.model import ModelConfig
from llmtrain.config.published import PRESETS
from llmtrain.convert.export import canonical_names, export_hf
from llmtrain.convert.names import FAMILIES, from_hf, pick_family, to_hf
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
    assert json.loads((folder / "config.json").read_text())["sandwich_norm"] is True
    assert {
        f"model.layers.1.{n}.weight" for n in ("input_layernorm", "post_attention_layernorm", "pre_mlp_layernorm", "post_mlp_layernorm")
    } <= set(stored)
    back = {from_hf(name, "openpangu"): tensor for name, tensor in stored.items()}
    own = dict(model.named_parameters())
    assert back.keys() == own.keys() and all(torch.equal(back[name], own[name]) for name in own)
    assert "from_hf" in (folder / "README.md").read_text()


@pytest.mark.parametrize("preset", list(PRESETS))
def test_names_are_invertible(preset):
    cfg = ModelConfig.model_validate({"preset": preset, "layers": 2})
    family = pick_family(cfg)
    assert family in FAMILIES
    names = canonical_names(cfg)
    assert [from_hf(to_hf(name, family), family) for name in names] == names
    assert len({to_hf(name, family) for name in names}) == len(names)


def test_what_does_not_fit_is_said(tmp_path):
    with pytest.raises(UserError, match=r"model\.ffn\.activation gelu"):
        pick_family(ModelConfig.model_validate({"ffn": {"activation": "gelu"}}))
    cfg, model = model_of(CASES["llama"])
    with pytest.raises(UserError, match=r"missing \['lm_head.weight'\]"):
        export_hf(tmp_path / "hf", cfg, [(n, p) for n, p in model.named_parameters() if n != "head.weight"])
    assert not (tmp_path / "hf").exists()
    with pytest.raises(UserError, match=r"no counterpart"):
        to_hf("blocks.0.attention.gate.weight", "llama")


def test_dtype_and_replacement(tmp_path):
    cfg, model = model_of(CASES["llama"])
    export_hf(tmp_path / "hf", cfg, model.named_parameters())
    export_hf(tmp_path / "hf", cfg, model.named_parameters(), dtype=torch.bfloat16)
    assert json.loads((tmp_path / "hf/config.json").read_text())["torch_dtype"] == "bfloat16"
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
