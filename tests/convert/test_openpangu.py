"""A sandwich-norm export under openPangu's names: a forward pass written from the paper, and transformers with our classes, both agree."""

import json
import math
import subprocess
import sys

import pytest
import torch
from hf_models import empty, tokens
from safetensors.torch import load_file

from llmtrain.config.model import ModelConfig
from llmtrain.convert.export import export_hf
from llmtrain.convert.hf_read import model_config
from llmtrain.model import initialise
from llmtrain.ops import Mask

SHAPE = {"vocab_size": 97, "layers": 2, "hidden": 32, "max_seq_len": 64, "ffn": {"hidden": 48}, "init": {"std": 0.2}}
SHAPE |= {"attention": {"heads": 4, "kv_heads": 2}, "norm": {"placement": "depth_scaled_sandwich", "eps": 1e-3}}


@pytest.fixture
def exported(tmp_path):
    cfg = ModelConfig.model_validate(SHAPE)
    model = empty(cfg)
    initialise(model, cfg, 7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())))
    return export_hf(tmp_path / "hf", cfg, model.named_parameters()), model(tokens(), mask=Mask())["logits"].detach()


def by_the_paper(folder, ids):
    """Logits [S,V] of ids [S] from config.json and safetensors alone, in fp64; shares no code with the model."""
    config, w = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    w = {name.removeprefix("model."): tensor.double() for name, tensor in w.items()}
    heads, groups = config["num_attention_heads"], config["num_attention_heads"] // config["num_key_value_heads"]
    d = config["head_dim"]

    def norm(x, name):
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + config["rms_norm_eps"]) * w[f"{name}.weight"]

    def turned(x):  # [S, heads, d]: pair (i, i + d/2) of position t turns by t * theta^(-2i/d)
        t = torch.arange(len(x), dtype=torch.float64)[:, None, None]
        turn = torch.polar(
            torch.ones(1, dtype=torch.float64), t * config["rope_theta"] ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)
        )
        pairs = torch.complex(x[..., : d // 2], x[..., d // 2 :]) * turn
        return torch.cat((pairs.real, pairs.imag), -1)

    def attention(x, at):
        q, k, v = ((x @ w[f"{at}.{n}_proj.weight"].T).view(len(x), -1, d) for n in "qkv")
        q, k = turned(q), turned(k)
        rows = []
        for head in range(heads):
            scores = q[:, head] @ k[:, head // groups].T / math.sqrt(d)
            scores[torch.ones_like(scores).triu(1).bool()] = -math.inf
            rows.append(scores.softmax(-1) @ v[:, head // groups])
        return torch.cat(rows, -1) @ w[f"{at}.o_proj.weight"].T

    def ffn(x, at):
        gate, up = (x @ w[f"{at}.{n}_proj.weight"].T for n in ("gate", "up"))
        return (gate / (1 + torch.exp(-gate)) * up) @ w[f"{at}.down_proj.weight"].T

    h = w["embed_tokens.weight"][ids]
    for layer in range(config["num_hidden_layers"]):
        at = f"layers.{layer}"
        h = h + norm(attention(norm(h, f"{at}.input_layernorm"), f"{at}.self_attn"), f"{at}.post_attention_layernorm")
        h = h + norm(ffn(norm(h, f"{at}.pre_mlp_layernorm"), f"{at}.mlp"), f"{at}.post_mlp_layernorm")
    return norm(h, "norm") @ w["lm_head.weight"].T


def test_the_export_by_the_paper(exported):
    folder, logits = exported
    for ids, expected in zip(tokens(), logits):
        torch.testing.assert_close(by_the_paper(folder, ids).float(), expected, atol=1e-5, rtol=1e-5)


LOADING = """
import sys, torch
from transformers import AutoModelForCausalLM
from llmtrain.convert.openpangu import register
register()
model, info = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32, output_loading_info=True)
assert not any(info.values()), info
model.save_pretrained(sys.argv[2])
ids = torch.load(sys.argv[3])
with torch.no_grad():
    torch.save(model.eval()(ids).logits, sys.argv[3])
cached, uncached = (model.generate(ids[:1, :4], max_new_tokens=4, do_sample=False, use_cache=use) for use in (True, False))
assert torch.equal(cached, uncached)
"""


def test_transformers_with_our_classes(exported, tmp_path):
    pytest.importorskip("transformers", reason="the classes are built on transformers")
    folder, logits = exported
    torch.save(tokens(), tmp_path / "ids.pt")
    words = [sys.executable, "-c", LOADING, str(folder), str(tmp_path / "again"), str(tmp_path / "ids.pt")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=600)  # a process of its own: registering lasts
    assert done.returncode == 0, done.stderr[-3000:]
    torch.testing.assert_close(torch.load(tmp_path / "ids.pt"), logits, atol=1e-5, rtol=1e-5)
    assert model_config(tmp_path / "again") == model_config(folder)  # what transformers saved is read again


def test_without_a_sandwich_it_is_llama_with_biases():
    from llmtrain.convert.hf_read import model_values

    config = {"architectures": ["PanguEmbeddedForCausalLM"], "vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2}
    config |= {"intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    cfg = ModelConfig.model_validate(model_values(config))
    assert cfg.norm.placement == "pre" and cfg.attention.qkv_bias and cfg.attention.out_bias
    assert not ModelConfig.model_validate(model_values(config | {"bias": False})).attention.qkv_bias


def test_convert_verifies_it(exported, tmp_path):
    pytest.importorskip("transformers", reason="the classes are built on transformers")
    words = [sys.executable, "-m", "llmtrain", "convert", str(exported[0]), str(tmp_path / "run"), "--to", "native", "--verify"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and "verify: logits differ by at most" in done.stdout, done.stderr[-3000:]
