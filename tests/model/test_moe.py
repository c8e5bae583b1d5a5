"""The mixture of experts against formulas that know nothing of sorting, and how it is configured, counted and initialised."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from llmtrain.config.errors import ConfigError
from llmtrain.config.ffn import FFNConfig, MoEConfig
from llmtrain.config.load import load
from llmtrain.config.model import ModelConfig
from llmtrain.config.parameters import count_parameters, flops_per_token
from llmtrain.model import build, initialise
from llmtrain.model.moe import MoE
from llmtrain.model.router import highest, within_capacity
from llmtrain.ops import Call, Mask, resolve

SHAPE = {"vocab_size": 61, "layers": 2, "hidden": 32, "max_seq_len": 48, "attention": {"heads": 4, "kv_heads": 2}, "init": {"std": 0.2}}
MOE = {"kind": "moe", "experts": 6, "top_k": 2, "hidden": 20}
CASES = {
    "swiglu": MOE,
    "as it is": MOE | {"router": {"renormalise": False}},
    "gelu": MOE | {"activation": "gelu"},
    "top 1": MOE | {"top_k": 1, "router": {"renormalise": False}},
    "all": MOE | {"top_k": 6},
}


def layer(ffn: dict, dtype=torch.float64) -> MoE:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    call = Call(device="cpu", dtype=dtype, expert_widths=(32, ffn["hidden"]))
    module = MoE(ModelConfig(**SHAPE, ffn=ffn), ops=resolve({}, call)).to(dtype)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return module


def dense_formula(weights: dict, ffn: dict, x):
    """Every expert over every token, weighed by probabilities that are 0 where a token does not go; x [N,D]."""
    scores = torch.exp(x @ weights["router.weight"].T)
    scores = scores / scores.sum(1, keepdim=True)  # [N,E]
    rank = (scores[:, None, :] > scores[:, :, None]).sum(-1)  # how many experts are more probable
    probs = torch.where(rank < ffn["top_k"], scores, 0.0)
    if ffn.get("router", {}).get("renormalise", True):
        probs = probs / probs.sum(1, keepdim=True)
    up = torch.einsum("nd,edf->enf", x, weights["experts.up_proj"])
    if ffn.get("activation") == "gelu":
        inner = 0.5 * up * (1 + torch.tanh(math.sqrt(2 / math.pi) * (up + 0.044715 * up**3)))
    else:
        gate = torch.einsum("nd,edf->enf", x, weights["experts.gate_proj"])
        inner = gate * torch.sigmoid(gate) * up
    return torch.einsum("ne,enf,efd->nd", probs, inner, weights["experts.down_proj"])


@pytest.mark.parametrize("case", CASES)
def test_equals_the_dense_formula_forward_and_backward(case):
    module = layer(CASES[case])
    x = torch.randn(2, 11, 32, dtype=torch.float64, requires_grad=True)
    weights = dict(module.named_parameters())
    assert weights.keys() - {"experts.gate_proj"} == {"router.weight", "experts.up_proj", "experts.down_proj"}
    got, want = module(x), dense_formula(weights, CASES[case], x.flatten(0, 1)).view_as(x)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    leaves, weigh = [x, *weights.values()], torch.randn_like(x)
    for mine, expected in zip(torch.autograd.grad(got, leaves, weigh), torch.autograd.grad(want, leaves, weigh)):
        torch.testing.assert_close(mine, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_of_equal_scores_the_first_column_wins(dtype):
    scores = torch.tensor([[0.1, 0.3, 0.3, 0.3], [0.25] * 4, [0.0, -0.0, -1.0, -0.0], [-2.0, -1.0, -1.0, -3.0]], dtype=dtype)
    assert highest(scores, 2).tolist() == [[1, 2], [0, 1], [0, 1], [1, 2]]
    many = torch.randint(0, 5, (200, 64), generator=torch.Generator().manual_seed(0)).to(dtype) / 7 - 0.3
    expected = [sorted(range(64), key=lambda i: (-row[i], i))[:9] for row in many.tolist()]
    assert highest(many, 9).tolist() == expected


def test_the_router_computes_in_fp32_whatever_it_is_given():
    module, exact = layer(MOE, torch.bfloat16), layer(MOE)
    exact.load_state_dict(module.state_dict())
    x = torch.randn(300, 32).bfloat16()
    (probs, ids, *_), (expected, expected_ids, *_) = module.router(x), exact.router(x.double())
    assert probs.dtype == torch.float32 and torch.equal(ids, expected_ids)
    torch.testing.assert_close(probs.double(), expected, rtol=1e-5, atol=1e-7)
    assert module(x).dtype == torch.bfloat16


def test_a_model_of_moe_blocks_learns_through_every_parameter(tokens):
    cfg = ModelConfig(**SHAPE, ffn=MOE)
    with torch.device("meta"):
        model = build(cfg, resolve({}, Call(device="cpu", dtype=torch.float64)), 16)
    model = model.double().to_empty(device="cpu")
    initialise(model, cfg, 3)
    model(tokens, mask=Mask(), targets=tokens.roll(-1, 1))["ce_sum"].backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.norm() > 0, name
    names = [n for n in dict(model.named_parameters()) if n.startswith("blocks.1.ffn.")]
    assert names == ["blocks.1.ffn." + n for n in ("router.weight", "experts.gate_proj", "experts.up_proj", "experts.down_proj")]
    assert list(model.state_dict()) == list(dict(model.named_parameters()))


def test_experts_start_as_matrices_do():
    cfg = ModelConfig(**SHAPE | {"hidden": 64, "layers": 8, "init": {"std": 0.02}}, ffn=MOE | {"hidden": 64})
    with torch.device("meta"):
        model = build(cfg, resolve({}, Call(device="cpu", dtype=torch.float32)), 16)
    model.to_empty(device="cpu")
    initialise(model, cfg, 3)
    ffn = model.blocks["5"].ffn
    expected = {"gate_proj": 0.02, "up_proj": 0.02, "down_proj": 0.02 / math.sqrt(2 * 8)}
    for name, std in expected.items():
        stack = getattr(ffn.experts, name)
        assert stack.std().item() == pytest.approx(std, rel=0.03)
        assert not torch.equal(stack[0], stack[1])
    assert ffn.router.weight.std().item() == pytest.approx(0.02, rel=0.15)


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
@pytest.mark.parametrize("heads", [0, 2])
def test_parameters_and_active_ones(activation, heads):
    cfg = ModelConfig(**SHAPE, ffn=MOE | {"activation": activation}, mtp={"heads": heads}, norm={"placement": "sandwich"})
    with torch.device("meta"):
        model = build(cfg, resolve({}, Call(device="cpu", dtype=torch.float32)), 64)
    counts = count_parameters(cfg)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    assert counts["total"] == sum(sizes.values())
    assert counts["mtp"] == sum(size for name, size in sizes.items() if name.startswith("mtp."))
    idle = sum(size * 4 // 6 for name, size in sizes.items() if ".experts." in name)  # 2 of 6 work
    assert counts["active"] == counts["total"] - idle


def test_flops_count_active_experts_alone():
    few, many = (ModelConfig(**SHAPE, ffn=MOE | {"experts": experts}) for experts in (6, 12))
    wide = ModelConfig(**SHAPE, ffn={"hidden": 2 * 20})
    routers = 6 * 2 * 32  # FLOPs per expert: 6 for each weight, of two blocks of width 32
    assert flops_per_token(many, 48) - flops_per_token(few, 48) == routers * 6
    assert flops_per_token(few, 48) - flops_per_token(wide, 48) == routers * 6


def test_mixtral_is_as_large_as_published():
    mixtral = ModelConfig(
        vocab_size=32_000,
        layers=32,
        hidden=4096,
        attention={"heads": 32, "kv_heads": 8},
        ffn={"kind": "moe", "experts": 8, "top_k": 2, "hidden": 14_336},
    )
    counts = count_parameters(mixtral)
    assert (counts["total"], round(counts["active"] / 1e9, 1)) == (46_702_792_704, 12.9)  # arXiv 2401.04088: 47B and 13B


def test_dense_is_what_a_section_without_kind_means():
    assert ModelConfig(ffn={"hidden": 7}).ffn == FFNConfig(hidden=7) and ModelConfig().ffn == FFNConfig()
    assert ModelConfig(ffn=MOE).ffn == MoEConfig(**MOE)


def test_another_kind_starts_afresh_over_a_preset_without_one():
    ffn = load({"model": {"preset": "llama3_8b"}}, ["--model.ffn.kind", "moe", "--model.ffn.experts", "4"]).run.model.ffn
    assert ffn == MoEConfig(kind="moe", experts=4)  # not the preset's width of the dense branch
    assert load({"model": {"preset": "llama3_8b"}}, ["--model.ffn.kind", "dense"]).run.model.ffn.hidden == 14_336


@pytest.mark.parametrize(
    ("ffn", "message"),
    [
        ({"kind": "moe", "experts": 2, "top_k": 3}, r"model\.ffn\.top_k 3 is more than model\.ffn\.experts 2"),
        ({"kind": "moe", "renormalise": True}, r"model\.ffn\.renormalise: no such option"),
        ({"kind": "moe", "router": {"groups": 3}}, r"model\.ffn\.router\.groups 3 must divide model\.ffn\.experts 8"),
        (
            {"kind": "moe", "top_k": 5, "router": {"groups": 4, "top_groups": 2}},
            r"top_k 5 is more than the 4 experts",
        ),
        ({"kind": "mo"}, r"model\.ffn\.kind: 'mo' is not allowed.*one of dense, moe"),
        ({"experts": 4}, r"model\.ffn\.experts: no such option"),
    ],
)
def test_what_is_refused(ffn, message):
    with pytest.raises(ConfigError, match=message):
        load({"model": {"ffn": ffn}}, [])


def test_close_to_transformers_mixtral_block():
    """The same layer by another project: softmax over all experts, top-k, renormalised."""
    transformers = pytest.importorskip("transformers")
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = transformers.MixtralConfig(hidden_size=32, intermediate_size=20, num_local_experts=6, num_experts_per_tok=2)
    config._experts_implementation = "eager"
    theirs, mine = MixtralSparseMoeBlock(config).double(), layer(MOE)
    with torch.no_grad():
        theirs.gate.weight.copy_(mine.router.weight)
        theirs.experts.gate_up_proj.copy_(torch.cat((mine.experts.gate_proj, mine.experts.up_proj), 2).transpose(1, 2))
        theirs.experts.down_proj.copy_(mine.experts.down_proj.transpose(1, 2))
        x = torch.randn(2, 9, 32, dtype=torch.float64)
        out = theirs(x)
        torch.testing.assert_close(mine(x), out[0] if isinstance(out, tuple) else out, rtol=1e-5, atol=1e-5)  # its router is in fp32


def test_a_width_that_the_fast_grouped_product_refuses_gets_another_one():
    call = Call(device="cpu", dtype=torch.bfloat16, expert_widths=(32, 20))
    choice = resolve({}, call).choices["grouped_mm"]
    assert choice.name == "loop" and "20 elements are 40 bytes" in choice.rejected["torch"]
    assert resolve({}, replace(call, dtype=torch.float32)).choices["grouped_mm"].name == "torch"


def test_no_token_for_most_experts_still_gives_every_weight_a_gradient():
    for dtype in (torch.float32, torch.float64):  # two implementations of the grouped product
        module = layer(MOE | {"top_k": 1, "router": {"renormalise": False}}, dtype)
        x = torch.randn(1, 32, dtype=dtype)
        module(x).sum().backward()
        gradients = [p.grad.flatten(1).norm(dim=1) for p in module.experts.parameters()]
        assert all((g > 0).sum() == 1 and g.isfinite().all() for g in gradients)
        assert F.one_hot(module.router(x)[1][0], 6).sum() == 1


def test_sequences_left_over_find_the_room_of_a_whole_group():
    module = layer(MOE | {"capacity": {"factor": 0.5, "sequences": 2}})
    x = torch.randn(3, 9, 32, dtype=torch.float64)
    choice = module.router(x.flatten(0, 1))
    admitted = module.admit(choice.probs, choice.ids, rows=3)
    room = 3  # half of 2 x 18 choices of a group over 6 experts
    assert torch.equal(admitted[:18], module.admit(choice.probs[:18], choice.ids[:18], rows=2))
    wanted, found = (torch.bincount(ids[18:].flatten(), minlength=7)[:6] for ids in (choice.ids, admitted))
    assert torch.equal(found, wanted.clamp(max=room)) and wanted.max() > room


def test_of_tokens_that_differ_by_rounding_alone_the_first_finds_room():
    probs = torch.tensor([0.5, 0.25, 0.25 + 1e-16, 0.25 - 1e-7, 0.24], dtype=torch.float64)[:, None]
    for dtype in (torch.float64, torch.float32):
        ids = within_capacity(probs.to(dtype), torch.zeros(5, 1, dtype=torch.int64), 1, groups=1, capacity=2)
        assert ids.flatten().tolist() == [0, 0, 1, 1, 1]
