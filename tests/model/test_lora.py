"""Adapters in a model: what they add, where they begin, what is frozen, and what is refused."""

import copy
import math

import pytest
import torch
from pydantic import ValidationError

from llmtrain.config.lora import LoraConfig, adapted, adapter_parameters
from llmtrain.config.model import ModelConfig
from llmtrain.config.parameters import flops_per_token, matmul_parameters
from llmtrain.config.run import RunConfig
from llmtrain.convert.adapters import is_adapter, merged
from llmtrain.errors import UserError
from llmtrain.model import build
from llmtrain.model.init import initialise
from llmtrain.model.lora import add_adapters
from llmtrain.ops import Call, Mask, resolve

SHAPE = {"vocab_size": 61, "layers": 2, "hidden": 64, "attention": {"heads": 4, "kv_heads": 2, "qkv_bias": True}, "ffn": {"hidden": 96}}
LATENT = {"kind": "mla", "heads": 4, "query_rank": 12, "kv_rank": 10, "nope_dim": 8, "rope_dim": 4, "value_dim": 6}
EXPERTS = {"kind": "moe", "experts": 4, "top_k": 2, "hidden": 16}
TOKENS = torch.arange(24).view(2, 12)


def base(**changes) -> tuple[ModelConfig, torch.nn.Module]:
    cfg = ModelConfig.model_validate(SHAPE | changes)
    heads = {"head_dim": cfg.head_dim, "value_head_dim": cfg.value_head_dim, "heads": cfg.attention.heads, "kv_heads": cfg.kv_heads}
    model = build(cfg, resolve({}, Call(device="cpu", dtype=torch.float64, **heads)), 64).double()
    initialise(model, cfg, 7)
    return cfg, model


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS, mask=Mask())["logits"]


@pytest.mark.parametrize(
    ("changes", "lora"),
    [
        ({}, {}),
        ({"ffn": {"hidden": 96, "activation": "gelu"}}, {}),
        ({}, {"targets": ["q", "down"]}),
        ({"attention": LATENT}, {}),
        ({"attention": LATENT, "ffn": EXPERTS}, {"targets": ["q_up", "o"]}),
    ],
)
def test_adapters_begin_at_nothing_and_add_what_merging_does(changes, lora):
    lora = LoraConfig(rank=3, alpha=12, **lora)
    cfg, model = base(**changes)
    before, plain = copy.deepcopy(model), logits(model)
    add_adapters(model, lora)
    initialise(model, cfg, 7, adapters_only=True)
    assert torch.equal(logits(model), plain)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert set(trained) == {name for name, _ in model.named_parameters() if is_adapter(name)}
    assert sorted({name.rpartition(".")[0] for name in trained}) == sorted(adapted(lora, cfg))
    assert sum(p.numel() for p in trained.values()) == adapter_parameters(lora, cfg)

    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in trained.values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.1)
    assert (logits(model) - plain).abs().max() > 1e-3
    whole = dict(merged(((n, p.detach()) for n, p in model.named_parameters()), set(adapted(lora, cfg)), lora.scale))
    assert whole.keys() == dict(before.named_parameters()).keys()
    before.load_state_dict(whole, strict=False)
    torch.testing.assert_close(logits(before), logits(model), rtol=0, atol=1e-12)


def test_first_weights_have_pefts_spread_and_are_drawn_by_name():
    cfg, model = base(hidden=256)
    add_adapters(model, LoraConfig(rank=16))
    initialise(model, cfg, 7, adapters_only=True)
    a = dict(model.named_parameters())["blocks.1.ffn.up_proj.lora_a"]
    assert float(a.detach().std()) == pytest.approx(1 / math.sqrt(3 * 256), rel=0.05)
    assert not torch.equal(a, dict(model.named_parameters())["blocks.0.ffn.up_proj.lora_a"])
    assert not any(p.any() for name, p in model.named_parameters() if name.endswith("lora_b"))


def test_only_adapters_have_gradients():
    _, model = base()
    add_adapters(model, LoraConfig(rank=2, targets=["v"]))
    initialise(model, model.cfg, 7, adapters_only=True)
    model(TOKENS, mask=Mask(), targets=TOKENS)["ce_sum"].backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {
        f"blocks.{block}.attention.v_proj.lora_{side}" for block in (0, 1) for side in "ab"
    }


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lora": {"targets": ["q", "q"]}}, "each once"),
        ({"lora": {"targets": []}}, "each once"),
        ({"lora": {"targets": ["q_up"]}}, "this model has no q_up; it has q, k, v, o, gate, up, down"),
        ({"model": {"ffn": EXPERTS}}, r"experts, whose stacked weights get no adapters; set lora.targets \[q, k, v, o\]"),
        ({"model": {"ffn": EXPERTS}, "lora": {"targets": ["up"]}}, "get no adapters"),
        ({"model": {"ffn": EXPERTS | {"router": {"bias_rate": 0.1}}}, "lora": {"targets": ["q"]}}, "bias_rate 0.1 moves"),
    ],
)
def test_what_cannot_be_is_refused_by_name(changes, said):
    values = {"model": SHAPE | changes.get("model", {}), "lora": {"rank": 4} | changes.get("lora", {})}
    with pytest.raises(ValidationError, match=said):
        RunConfig.model_validate(values)


def test_flops_are_those_of_the_products_that_are_made():
    cfg, plain = ModelConfig.model_validate(SHAPE), ModelConfig.model_validate(SHAPE | {"layers": 3})
    count = adapter_parameters(LoraConfig(rank=4), cfg)
    blocks = matmul_parameters(cfg) + 61 * 64
    assert flops_per_token(cfg, 8) - flops_per_token(cfg, 8, adapters=count) == 2 * blocks - 6 * count
    assert flops_per_token(plain, 8, adapters=0) == flops_per_token(plain, 8)


def test_a_family_without_such_projections_is_refused():
    _, model = base()
    model.blocks["0"].ffn = torch.nn.Identity()
    with pytest.raises(UserError, match=r"Transformer has no projection blocks.0.ffn.gate_proj; set lora.targets"):
        add_adapters(model, LoraConfig(rank=4))
