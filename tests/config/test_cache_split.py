"""The split of layers between device and host, against arithmetic by hand, real buffers and a measured pass."""

from pathlib import Path

import pytest
import torch
from held import Held, build_model

from llmtrain.cli import main
from llmtrain.config.cache_split import Answering, cache_split, fixed_parts, layer_bytes, longest
from llmtrain.config.model import ModelConfig
from llmtrain.config.parameters import count_parameters
from llmtrain.hardware import load
from llmtrain.model.cache import SlotCache
from llmtrain.ops import Mask
from llmtrain.tools.open_model import read_model_config

LATENT = {"kind": "mla", "heads": 4, "query_rank": 24, "kv_rank": 16, "nope_dim": 16, "rope_dim": 8, "value_dim": 16}
MODELS = {
    "swiglu": {"attention": {"heads": 8, "kv_heads": 2}, "ffn": {"hidden": 352}},
    "gelu": {"attention": {"heads": 8}, "ffn": {"hidden": 512, "activation": "gelu", "bias": True}, "norm": {"kind": "layer_norm"}},
    "wide heads": {"attention": {"heads": 16, "head_dim": 32}, "ffn": {"hidden": 64}},
    "latent": {"attention": LATENT, "ffn": {"hidden": 352}},
    "experts": {"attention": {"heads": 8}, "ffn": {"kind": "moe", "experts": 8, "top_k": 2, "hidden": 96}},
}
ROOT = Path(__file__).parents[2]
PANGU, PAGE = ROOT / "examples/long_generation/pangu-38b", ROOT / "docs/long-generation.md"
PASS = "a prompt's pass"
V100 = 0.95 * load("v100-32").memory.value


def config(name: str) -> ModelConfig:
    return ModelConfig.model_validate({"vocab_size": 61, "layers": 3, "hidden": 128, "max_seq_len": 4096} | MODELS[name])


def test_the_formula_by_hand():
    """Llama 3 8B's shape: 32 layers, 8 key/value heads of 128, 128,256 pieces; 65,536 tokens in bf16 on two devices of 17 GB."""
    from llmtrain.config.load import load as load_run

    model = load_run(None, ["--model", "llama3_8b"]).run.model
    asked = Answering(rows=1, tokens=65_536, ranks=2)
    layer = 65_536 * 4 * 2 * 128 * 2
    block = 4096 * (4096 + 2 * 1024 + 4096 + 3 * 14_336) / 2  # matrices; norms are counted whole
    vocabulary = 2 * 128_256 * 4096 / 2 * 2
    act = 65_536 * (5 * 4096 + 2048 + 4 * 7168 + 2 * 128 + 4) * 2
    free = 17e9 - (32 * block + 65 * 4096) * 2 - vocabulary - act
    found = cache_split(model, asked, memory=17e9)
    assert layer_bytes(model, asked) == found.layer == layer
    assert (found.device_layers, found.host_layers) == (int(free // layer), 32 - int(free // layer)) and 0 < found.device_layers < 32
    assert found.host == found.host_layers * layer * 2 and found.device <= 17e9 < found.device + found.layer


@pytest.mark.parametrize("name", MODELS)
def test_a_layers_bytes_are_those_of_its_buffers(name):
    cfg, cache = config(name), SlotCache(3, 40)
    asked = Answering(rows=3, tokens=40, itemsize=8)
    model = build_model(cfg.model_dump(), dtype=torch.float64, quick=True).requires_grad_(False)
    model(torch.zeros(3, 5, dtype=torch.int64), mask=Mask(), cache=cache.fill(0, 3), positions=torch.arange(5)[None], last=0)
    assert cache.nbytes == cfg.layers * layer_bytes(cfg, asked)
    parts = fixed_parts(cfg, asked)
    assert parts["weights of blocks"] + parts["embedding and head"] == 8 * count_parameters(cfg)["total"]


class Peak(Held):
    """The most that existed at once."""

    peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = super().__torch_dispatch__(func, types, args, kwargs)
        self.peak = max(self.peak, self.bytes())
        return result


@pytest.mark.parametrize("name", MODELS)
def test_a_prompts_pass_holds_what_is_said(name):
    """Between what is measured and a third more; what the attention op holds inside itself is left out."""
    cfg, length = config(name), 1024
    model = build_model(cfg.model_dump(), dtype=torch.float32, quick=True).requires_grad_(False)
    tokens = torch.zeros(1, length, dtype=torch.int64)
    model.blocks["0"].attention.ops.attention = lambda q, k, v, **_: v.repeat_interleave(q.shape[1] // v.shape[1], 1)  # of all blocks
    with torch.inference_mode(), Peak(*model.parameters(), tokens) as peak:
        model(tokens, mask=Mask(), positions=torch.arange(length)[None], last=1)
    said = fixed_parts(cfg, Answering(rows=1, tokens=length, itemsize=4))[PASS]
    assert said / 1.35 < peak.peak < said + 1024, "a few numbers are not per token"


def test_the_page_has_what_the_plan_prints(capsys):
    text = PAGE.read_text()
    command = next(line for line in text.splitlines() if line.startswith("llmtrain generate") and "--plan" in line)
    assert main([str(ROOT / word) if word.startswith("examples/") else word for word in command.split()[1:]]) == 0
    printed = "".join(f"    {line}\n" for line in capsys.readouterr().out.splitlines())
    assert printed in text, printed
    model, asked = read_model_config(PANGU), Answering(rows=1, tokens=1, ranks=8, chunks=16)
    for tokens in (65_536, 81_920, 98_304, 131_072, 196_608, 262_144):
        split = cache_split(model, asked._replace(tokens=tokens), memory=V100)
        row = f"| {tokens:,} | {split.device_layers} | {split.host_layers} | {split.host / 2**30:g} |"
        assert row in text, row
    whole = asked._replace(chunks=1, tokens=262_144)
    assert f"{fixed_parts(model, whole)[PASS] / 2**30:.1f} GiB then" in text
    assert f"{longest(model, whole, memory=V100, host=2**50):,} tokens. By" in text


def test_what_the_plan_of_a_38b_model_says():
    """256K tokens on eight V100 of 32 GB, which the paper reports; the model's shape is assumed."""
    model = read_model_config(PANGU)
    assert count_parameters(model)["total"] == pytest.approx(38e9, rel=0.04)
    asked = Answering(rows=1, tokens=256 * 1024, ranks=8, chunks=16)
    split = cache_split(model, asked, memory=V100)
    assert split is not None and split.host_layers == 48 and split.host == 384 * 2**30
    alone, helped = (longest(model, asked, memory=V100, host=size) for size in (0, 512 * 2**30))
    assert alone < 256 * 1024 <= helped
    for tokens, host in ((alone, 0), (helped, 512 * 2**30)):
        fits, beyond = (cache_split(model, asked._replace(tokens=tokens + more), memory=V100) for more in (0, 1))
        assert fits.host <= host and (beyond is None or beyond.host > host)
    assert cache_split(model, asked._replace(chunks=1), memory=V100) is None, "without tiles a prompt's pass leaves no room"
