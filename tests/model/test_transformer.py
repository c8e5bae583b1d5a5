"""The whole model against its formula, and what a decoder has to keep whatever its options."""

import math

import pytest
import torch
import torch.nn.functional as F

from llmtrain.model import KVCache
from llmtrain.ops import Mask

ATTENTION = {"heads": 4, "kv_heads": 2}
GPT = {
    "attention": {"heads": 4, "qkv_bias": True, "out_bias": True},
    "ffn": {"hidden": 40, "activation": "gelu", "bias": True},
    "norm": {"kind": "layer_norm"},
    "position": {"kind": "learned"},
}
CASES = {
    "pre": {},
    "sandwich": {"norm": {"placement": "sandwich"}},
    "depth-scaled sandwich": {"norm": {"placement": "depth_scaled_sandwich", "eps": 1e-3}},
    "multi-head": {"attention": {"heads": 4}},
    "multi-query, head dim": {"attention": {"heads": 4, "kv_heads": 1, "head_dim": 12}},
    "qk_norm": {"attention": ATTENTION | {"qk_norm": True}, "position": {"base": 100.0}},
    "tied": {"tie_embeddings": True},
    "window": {"attention": ATTENTION | {"window": 5}},
    "gpt": GPT,
    "gpt tied sandwich": GPT | {"tie_embeddings": True, "norm": {"kind": "layer_norm", "placement": "sandwich"}},
    "yarn": {"position": {"scaling": {"kind": "yarn", "factor": 4, "original_seq_len": 8}}},
}
DOCUMENTS = ((5, 19), (24,))


def formula(cfg, weights: dict, tokens, *, positions, seen, base=None):
    """Logits [B,S,V] in float64, written out one head at a time; `seen` [B,S,S] says which keys a query may see."""

    def linear(x, name):
        return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0.0)

    def norm(x, name):
        if cfg.norm.kind == "layer_norm":
            x = x - x.mean(-1, keepdim=True)
        x = x / ((x**2).mean(-1, keepdim=True) + cfg.norm.eps).sqrt()
        return x * weights[f"{name}.weight"] + weights.get(f"{name}.bias", 0.0)

    def rotate(x):  # [B,S,d]: pair (i, i + d/2) turned as a complex number
        half = x.shape[-1] // 2
        frequency = torch.tensor([(base or cfg.position.base) ** (-2 * i / x.shape[-1]) for i in range(half)], dtype=torch.float64)
        turned = torch.complex(x[..., :half], x[..., half:]) * torch.exp(1j * positions[..., None] * frequency)
        return torch.cat((turned.real, turned.imag), -1)

    def attention(x, name):
        d, out = cfg.head_dim, []
        q, k, v = (linear(x, f"{name}.{part}_proj") for part in "qkv")
        for head in range(cfg.attention.heads):
            group = head // (cfg.attention.heads // cfg.kv_heads)
            one_q, one_k, one_v = q[..., head * d : (head + 1) * d], *(t[..., group * d : (group + 1) * d] for t in (k, v))
            if cfg.attention.qk_norm:
                one_q, one_k = norm(one_q, f"{name}.q_norm"), norm(one_k, f"{name}.k_norm")
            if cfg.position.kind == "rope":
                one_q, one_k = rotate(one_q), rotate(one_k)
            scores = (one_q @ one_k.transpose(1, 2) / math.sqrt(d)).masked_fill(~seen, -math.inf)
            out.append(scores.softmax(-1) @ one_v)
        return linear(torch.cat(out, -1), f"{name}.out_proj")

    def ffn(x, name):
        up = linear(x, f"{name}.up_proj")
        if cfg.ffn.activation == "gelu":
            inner = 0.5 * up * (1 + torch.tanh(math.sqrt(2 / math.pi) * (up + 0.044715 * up**3)))
        else:
            gate = linear(x, f"{name}.gate_proj")
            inner = gate * torch.sigmoid(gate) * up
        return linear(inner, f"{name}.down_proj")

    sandwich = cfg.norm.placement != "pre"
    x = weights["embedding.weight"][tokens]
    if cfg.position.kind == "learned":
        x = x + weights["position_embedding.weight"][positions]
    for layer in range(cfg.layers):
        block = f"blocks.{layer}"
        for branch, function in (("attention", attention), ("ffn", ffn)):
            out = function(norm(x, f"{block}.{branch}_norm"), f"{block}.{branch}")
            x = x + (norm(out, f"{block}.post_{branch}_norm") if sandwich else out)
    return norm(x, "final_norm") @ weights["embedding.weight" if cfg.tie_embeddings else "head.weight"].T


def layout(cfg, documents, size):
    """Positions [B,S] that start anew in every document, and which keys are seen [B,S,S]."""
    document = torch.stack([torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in documents])
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in documents])
    i, j = torch.arange(size)[:, None], torch.arange(size)[None]
    return positions, (document[:, :, None] == document[:, None]) & (j <= i) & (i - j < (cfg.attention.window or size))


@pytest.mark.parametrize("case", [c for c in CASES if c != "yarn"])
def test_logits_and_loss_equal_the_formula(case, make_model, tokens):
    cfg, model = make_model(CASES[case])
    positions, seen = layout(cfg, DOCUMENTS, 24)
    expected = formula(cfg, dict(model.named_parameters()), tokens, positions=positions, seen=seen)
    got = model(tokens, positions=positions, mask=Mask(documents=DOCUMENTS))["logits"]
    torch.testing.assert_close(got, expected, atol=1e-11, rtol=1e-9)
    targets = tokens.roll(-1, 1).masked_fill(torch.arange(24) % 5 == 0, -100)
    loss = model(tokens, positions=positions, mask=Mask(documents=DOCUMENTS), targets=targets)["ce_sum"]
    torch.testing.assert_close(loss, F.cross_entropy(expected.flatten(0, 1), targets.flatten(), reduction="sum", ignore_index=-100))


@pytest.mark.parametrize("case", ["pre", "depth-scaled sandwich", "qk_norm", "tied", "gpt"])
def test_gradients_equal_those_of_the_formula(case, make_model, tokens):
    """Of every parameter; none is left without one."""
    cfg, model = make_model(CASES[case])
    positions, seen = layout(cfg, ((24,), (24,)), 24)
    weights = dict(model.named_parameters())
    logits = formula(cfg, weights, tokens, positions=positions, seen=seen)
    expected = torch.autograd.grad(F.cross_entropy(logits.flatten(0, 1), tokens.roll(-1, 1).flatten(), reduction="sum"), weights.values())
    model(tokens, mask=Mask(), targets=tokens.roll(-1, 1))["ce_sum"].backward()
    for (name, parameter), gradient in zip(weights.items(), expected, strict=True):
        assert parameter.grad is not None, name
        assert gradient.norm() > 1e-6 or name.endswith("k_proj.bias"), name  # a softmax does not see what all its keys share
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-9 * max(1.0, gradient.norm().item()), rtol=1e-7, msg=name)


@pytest.mark.parametrize("case", CASES)
def test_later_tokens_and_other_documents_do_not_matter(case, make_model, tokens):
    cfg, model = make_model(CASES[case])
    positions, _ = layout(cfg, DOCUMENTS, 24)
    mask = Mask(documents=DOCUMENTS)
    changed = tokens.clone()
    changed[0, 2], changed[1, 15:] = (tokens[0, 2] + 1) % 61, (tokens[1, 15:] + 1) % 61
    with torch.no_grad():
        before, after = (model(t, positions=positions, mask=mask)["logits"] for t in (tokens, changed))
    torch.testing.assert_close(after[0, :2], before[0, :2])
    torch.testing.assert_close(after[0, 5:], before[0, 5:])  # the second document of the row
    torch.testing.assert_close(after[1, :15], before[1, :15])
    assert (after[0, 2:5] - before[0, 2:5]).abs().amin(0).max() > 1e-3 and (after[1, 15:] - before[1, 15:]).abs().max() > 1e-3


@pytest.mark.parametrize("case", CASES)
def test_decoding_with_a_cache_equals_the_whole_pass(case, make_model, tokens):
    _, model = make_model(CASES[case])
    cache, out = KVCache(24), []
    with torch.no_grad():
        whole = model(tokens, mask=Mask())["logits"]
        for part in tokens.split([7, 1, 1, 6, 1, 8], dim=1):
            out.append(model(part, mask=Mask(), cache=cache)["logits"])
        torch.testing.assert_close(torch.cat(out, 1), whole)
        cache.truncate(10)
        torch.testing.assert_close(model(tokens[:, 10:12], mask=Mask(), cache=cache)["logits"], whole[:, 10:12])
        with pytest.raises(ValueError, match="cache holds 24 tokens and 25"):
            model(tokens[:, :13], mask=Mask(), cache=cache)
        with pytest.raises(ValueError, match="documents=None"):
            model(tokens, mask=Mask(documents=DOCUMENTS), cache=KVCache(24))


def test_another_rope_base_from_the_next_pass_on(make_model, tokens):
    cfg, model = make_model()
    positions, seen = layout(cfg, ((24,), (24,)), 24)
    first = model(tokens, mask=Mask())["logits"]
    model.set_rope_base(50.0)
    expected = formula(cfg, dict(model.named_parameters()), tokens, positions=positions, seen=seen, base=50.0)
    torch.testing.assert_close(model(tokens, mask=Mask())["logits"], expected)
    model.set_rope_base(cfg.position.base)
    torch.testing.assert_close(model(tokens, mask=Mask())["logits"], first)
    _, learned = make_model(CASES["gpt"])
    with pytest.raises(ValueError, match=r"model\.position\.kind is 'learned'"):
        learned.set_rope_base(50.0)


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize("case", ["depth-scaled sandwich", "gpt", "qk_norm"])
def test_other_dtypes_run_and_come_near(case, dtype, close, make_model, tokens):
    _, exact = make_model(CASES[case])
    _, model = make_model(CASES[case], dtype=dtype)
    model.load_state_dict(exact.state_dict())
    with torch.no_grad():
        expected, got = exact(tokens, mask=Mask())["logits"], model(tokens, mask=Mask())["logits"]
    assert got.dtype == dtype
    assert (got.double() - expected).norm() < close * expected.norm()
    loss = model(tokens, mask=Mask(), targets=tokens)["ce_sum"]
    loss.backward()
    assert loss.dtype == torch.float32 and all(p.grad.dtype == dtype and p.grad.isfinite().all() for p in model.parameters())


def test_a_tied_head_stays_tied(make_model):
    _, model = make_model({"tie_embeddings": True}, dtype=torch.float32)  # built on meta and materialised
    assert model.head.weight is model.embedding.weight
    model.to(torch.bfloat16)
    assert model.head.weight is model.embedding.weight and model.head.weight.dtype == torch.bfloat16
    assert "head.weight" not in dict(model.named_parameters())
    _, untied = make_model()
    assert untied.head.weight is not untied.embedding.weight


def test_positions_count_on_from_the_cache_or_from_zero(make_model, tokens):
    _, model = make_model()
    with torch.no_grad():
        explicit = model(tokens, positions=torch.arange(24)[None].expand(2, -1), mask=Mask())["logits"]
        torch.testing.assert_close(model(tokens, mask=Mask())["logits"], explicit)
        # Only distances matter to RoPE.
        torch.testing.assert_close(model(tokens, positions=torch.arange(7, 31)[None], mask=Mask())["logits"], explicit)
