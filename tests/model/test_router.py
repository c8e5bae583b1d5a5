"""Routers and capacity against loops over tokens."""

import math

import pytest
import torch
import torch.nn.functional as F

from llmtrain.config.model import ModelConfig
from llmtrain.model.moe import MoE
from llmtrain.model.router import Router, within_capacity
from llmtrain.ops import Call, resolve

E, D, N = 12, 16, 37
BASE = {"hidden": D, "attention": {"heads": 4}}


def router(top_k: int = 3, **options) -> Router:
    torch.manual_seed(0)
    module = Router(ModelConfig(**BASE, ffn={"kind": "moe", "experts": E, "top_k": top_k, "router": options})).double()
    torch.nn.init.normal_(module.weight)
    if module.bias is not None:
        torch.nn.init.normal_(module.bias, std=0.3)
    return module


def token_by_token(module: Router, x):
    """Weights [N,E], 0 where a token does not go."""
    options, out = module.options, torch.zeros(len(x), E, dtype=x.dtype)
    for n, token in enumerate(x):
        logits = [(token @ row).item() for row in module.weight]
        if options.score == "sigmoid":
            scores = [1 / (1 + math.exp(-value)) for value in logits]
        else:
            scores = F.softmax(torch.tensor(logits, dtype=torch.float64), 0).tolist()
        bias = [0.0] * E if module.bias is None else module.bias.tolist()
        wanted = [score + shift for score, shift in zip(scores, bias)]
        size = E // options.groups
        worth = [sum(sorted(wanted[g * size : (g + 1) * size])[-2:]) for g in range(options.groups)]
        open_groups = sorted(range(options.groups), key=lambda g: -worth[g])[: options.top_groups]
        chosen = sorted((e for e in range(E) if e // size in open_groups), key=lambda e: -wanted[e])[: module.top_k]
        total = sum(scores[e] for e in chosen) if options.renormalise else 1.0
        for e in chosen:
            out[n, e] = scores[e] / total * options.scale
    return out


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"score": "sigmoid"},
        {"score": "sigmoid", "scale": 2.5, "bias_rate": 0.0},
        {"score": "sigmoid", "groups": 4, "top_groups": 2, "bias_rate": 0.001},
        {"groups": 3, "top_groups": 1, "renormalise": False},
    ],
    ids=str,
)
def test_chooses_and_weighs_as_a_loop_over_tokens(options):
    module = router(**options)
    x = torch.randn(N, D, dtype=torch.float64)
    choice = module(x)
    got = torch.zeros(N, E, dtype=torch.float64).scatter(1, choice.ids, choice.probs.detach())
    torch.testing.assert_close(got, token_by_token(module, x), rtol=1e-9, atol=1e-12)


def test_a_bias_moves_the_choice_but_no_weight_and_has_no_gradient():
    module = router(score="sigmoid", bias_rate=0.001, renormalise=False)
    x = torch.randn(N, D, dtype=torch.float64)
    module.bias.zero_()[5] = 10.0
    choice = module(x)
    assert (choice.ids == 5).any(1).all()
    torch.testing.assert_close(choice.probs, choice.scores.gather(1, choice.ids))
    assert [name for name, _ in module.named_parameters()] == ["weight"] and not module.bias.requires_grad


def test_force_balance_gives_every_expert_as_many():
    choice = router(top_k=3, force_balance=True)(torch.randn(E * 2, D, dtype=torch.float64))
    assert torch.bincount(choice.ids.flatten(), minlength=E).tolist() == [6] * E
    assert all(len(set(ids)) == 3 for ids in choice.ids.tolist())


def test_usage_is_summed_by_row():
    module = router(score="sigmoid")
    x = torch.randn(6, D, dtype=torch.float64)
    choice = module(x)
    ids = choice.ids.clone()
    ids[0, 0] = E
    usage = module.usage(choice, ids, 2, losses=True)
    for row, tokens in enumerate((range(3), range(3, 6))):
        assert usage.counts[row].tolist() == [sum(e in choice.ids[n].tolist() for n in tokens) for e in range(E)]
        expected = sum(choice.scores[n] / choice.scores[n].sum() for n in tokens)
        torch.testing.assert_close(usage.scores[row], expected)
    torch.testing.assert_close(usage.squares, sum((x[n] @ module.weight.T).exp().sum().log() ** 2 for n in range(6)))
    assert usage.dropped == 1 and module.usage(choice, ids, 2, losses=False).scores is None


def test_capacity_keeps_the_most_probable_of_every_group():
    generator = torch.Generator().manual_seed(3)
    ids = torch.stack([torch.randperm(4, generator=generator)[:2] for _ in range(20)])
    probs = torch.rand(20, 2, generator=generator).round(decimals=1)  # some are equal
    got = within_capacity(probs, ids, 4, groups=2, capacity=3)
    for half in (range(10), range(10, 20)):
        for expert in range(4):
            copies = [(n, slot) for n in half for slot in range(2) if ids[n, slot] == expert]
            kept = sorted(copies, key=lambda c: -probs[c].item())[:3]  # sorted keeps the order of equal ones
            assert [c for c in copies if got[c] == expert] == sorted(kept)
            assert all(got[c] == 4 for c in copies if c not in kept)


def layer(**ffn) -> MoE:
    torch.manual_seed(0)
    cfg = ModelConfig(**BASE, ffn={"kind": "moe", "experts": 4, "top_k": 2, "hidden": 12, **ffn})
    module = MoE(cfg, ops=resolve({}, Call(device="cpu", dtype=torch.float64))).double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return module


def by_hand(module: MoE, x, admitted=None):
    """The layer over x [N,D] token by token; `admitted` [N,k] are the experts that have room."""
    choice, experts = module.router(x), module.experts
    ids = choice.ids if admitted is None else admitted
    out = []
    for n, token in enumerate(x):
        sent = token if module.descend_proj is None else module.descend_proj(token)
        total = torch.zeros(experts.down_proj.shape[2], dtype=x.dtype)
        for prob, e in zip(choice.probs[n], ids[n].tolist()):
            if e == 4:
                continue
            up = sent @ experts.up_proj[e] + (0 if experts.up_bias is None else experts.up_bias[e])
            if experts.gate_proj is None:
                inner = F.gelu(up, approximate="tanh")
            else:
                inner = F.silu(sent @ experts.gate_proj[e] + (0 if experts.gate_bias is None else experts.gate_bias[e])) * up
            total = total + prob * (inner @ experts.down_proj[e] + (0 if experts.down_bias is None else experts.down_bias[e]))
        total = total if module.ascend_proj is None else module.ascend_proj(total)
        out.append(total if module.shared is None else total + module.shared(token))
    return torch.stack(out)


@pytest.mark.parametrize(
    "ffn",
    [
        {"shared_experts": 2},
        {"descend": 6},
        {"descend": 6, "activation": "gelu", "bias": True},
        {"bias": True, "shared_experts": 1},
        {"capacity": {"factor": 0.75}},
        {"capacity": {"factor": 0.5, "sequences": 2}, "descend": 6},
    ],
    ids=str,
)
def test_the_layer_equals_a_loop_over_tokens_forward_and_backward(ffn):
    module = layer(**ffn)
    x = torch.randn(2, 9, D, dtype=torch.float64, requires_grad=True)
    seen = []
    module.observe = lambda usage: seen.append(usage(losses=False))
    got, admitted = module(x), module._admitted(module.router(x.flatten(0, 1)), x)
    want = by_hand(module, x.flatten(0, 1), admitted).view_as(x)
    torch.testing.assert_close(got, want)
    assert seen[0].dropped == (admitted == 4).sum() and (seen[0].dropped > 0) == ("capacity" in ffn)
    leaves, weigh = [x, *module.parameters()], torch.randn_like(x)
    for mine, expected in zip(torch.autograd.grad(got, leaves, weigh), torch.autograd.grad(want, leaves, weigh)):
        torch.testing.assert_close(mine, expected)
