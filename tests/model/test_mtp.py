"""Multi-token prediction against a plain formula; what its heads are fed; and that nothing changes without them."""

import pytest
import torch

from llmtrain.config.parameters import count_parameters, flops_per_token
from llmtrain.data.batch import Batch
from llmtrain.data.shifted import shifted
from llmtrain.model import cross_entropy
from llmtrain.ops import Mask

CASES = {
    "one head": {"mtp": {"heads": 1}},
    "two heads": {"mtp": {"heads": 2, "loss_weight": 0.7}},
    "tied, sandwich": {"mtp": {"heads": 1}, "tie_embeddings": True, "norm": {"placement": "sandwich"}},
    "gpt": {
        "mtp": {"heads": 1, "loss_weight": 0.1},
        "norm": {"kind": "layer_norm"},
        "position": {"kind": "learned"},
        "attention": {"heads": 4},
    },
}
DOCUMENTS = ((5, 19), (24,), (1, 2, 3, 18))
POSITIONS = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in DOCUMENTS])


def batch_of(tokens) -> Batch:
    """Rows of whole documents: the last target of each is -100, but for the row's last token, whose successor is known."""
    ends = torch.cat((POSITIONS[:, 1:] == 0, torch.zeros(len(tokens), 1, dtype=torch.bool)), 1)
    following = torch.cat((tokens[:, 1:], (tokens[:, :1] + 7) % 61), 1)
    targets = following.masked_fill(ends, -100)
    return Batch(tokens, targets, POSITIONS, DOCUMENTS, samples=(0, 1, 2))


@pytest.fixture
def batch():
    return batch_of(torch.randint(0, 61, (3, 24), generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("by", [1, 2, 5])
def test_shifted_asks_for_later_tokens_of_the_same_document(batch, by):
    tokens, targets = shifted(batch, by)
    for row, lengths in enumerate(DOCUMENTS):
        start = 0
        stream = [*batch.tokens[row].tolist(), int(batch.targets[row, -1])]
        for length in lengths:
            for i in range(start, start + length):
                known = i + by < start + length  # the token before the wanted one is in this document
                expected = int(batch.targets[row, i + by]) if known else -100
                assert int(targets[row, i]) == expected
                if expected != -100:
                    assert int(tokens[row, i]) == stream[i + by] and expected == stream[i + by + 1]
            start += length
    assert tokens.shape == targets.shape == batch.tokens.shape and tokens.dtype == torch.int64


def test_shifted_at_the_end_of_a_row(batch):
    tokens, targets = shifted(batch, 2)
    assert tokens[:, -2].tolist() == batch.targets[:, -1].tolist() and tokens[:, -1].tolist() == [0, 0, 0]
    assert (targets[:, -2:] == -100).all()
    masked = Batch(batch.tokens, torch.full_like(batch.targets, -100), POSITIONS, DOCUMENTS, samples=(0, 1, 2))
    tokens, targets = shifted(masked, 1)
    assert (targets == -100).all() and tokens[:, -1].tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match=r"allowed are 1 to 23 .* model\.mtp\.heads"):
        shifted(batch, 24)


def test_answers_alone_count_where_prompts_are_masked(batch):
    prompt = torch.arange(24) < 9
    targets = batch.targets.masked_fill(prompt, -100)
    _, ahead = shifted(Batch(batch.tokens, targets, POSITIONS, DOCUMENTS, samples=(0, 1, 2)), 1)
    assert ahead[1].tolist() == [*([-100] * 8), *targets[1, 9:].tolist(), -100]  # row 1 is one document


def formula(cfg, model, batch, hidden):
    """(ce_sum, mtp_ce_sum) with each step written out; blocks and norms are taken from the model, which other tests hold to theirs."""

    def ce(x, targets):
        logits = model.final_norm(x) @ model.head.weight.T
        return sum(-logits[b, i].log_softmax(-1)[t] for b, row in enumerate(targets.tolist()) for i, t in enumerate(row) if t != -100)

    total, x = 0.0, hidden
    for n, head in enumerate(model.mtp, start=1):
        tokens = torch.zeros_like(batch.tokens)
        targets = torch.full_like(batch.tokens, -100)
        for b, lengths in enumerate(batch.documents):
            ends = torch.tensor(lengths).cumsum(0)
            stream = [*batch.tokens[b].tolist(), int(batch.targets[b, -1])]
            for i in range(24):
                end = int(ends[(ends > i).nonzero()[0, 0]])
                tokens[b, i] = stream[i + n] if i + n < len(stream) else 0
                if i + n < end and batch.targets[b, i + n] != -100:
                    targets[b, i] = stream[i + n + 1]
        embedded = model.embedding.weight[tokens]
        both = torch.cat((head.hidden_norm(x), head.embedding_norm(embedded)), -1)
        rope = model.rotation(batch.positions, x.dtype)
        x = head.block(both @ head.proj.weight.T, rope=rope, mask=Mask(documents=batch.documents))
        total = total + ce(x, targets)
    return ce(hidden, batch.targets), total


def residual_stream(model, batch):
    """[B,S,D] after the last block, before the final norm."""
    x = model.embed(batch.tokens, batch.positions)
    rope = model.rotation(batch.positions, x.dtype)
    for block in model.blocks.values():
        x = block(x, rope=rope, mask=Mask(documents=batch.documents))
    return x


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_equal_the_formula(case, make_model, batch):
    cfg, model = make_model(CASES[case])
    ahead = [shifted(batch, n) for n in range(1, cfg.mtp.heads + 1)]
    out = model(batch.tokens, positions=batch.positions, mask=Mask(documents=batch.documents), targets=batch.targets, ahead=ahead)
    ce, extra = formula(cfg, model, batch, residual_stream(model, batch))
    torch.testing.assert_close(out["ce_sum"], ce)
    torch.testing.assert_close(out["mtp_ce_sum"], extra)
    weights = dict(model.named_parameters())
    got = torch.autograd.grad(cross_entropy(out), weights.values())
    expected = torch.autograd.grad(ce + cfg.mtp.loss_weight * extra / cfg.mtp.heads, weights.values())
    for name, mine, theirs in zip(weights, got, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-9 * max(1.0, theirs.norm().item()), msg=name)
        assert theirs.norm() > 1e-6 or name.endswith("k_proj.bias"), name


def test_names(make_model):
    _, model = make_model({"mtp": {"heads": 2}, "norm": {"kind": "layer_norm"}})
    own = {name.removeprefix("mtp.1.") for name, _ in model.named_parameters() if name.startswith("mtp.1.")}
    norms = {f"{norm}.{part}" for norm in ("hidden_norm", "embedding_norm") for part in ("weight", "bias")}
    block = {name.removeprefix("blocks.0.") for name, _ in model.named_parameters() if name.startswith("blocks.0.")}
    assert own == norms | {"proj.weight"} | {f"block.{name}" for name in block}


def test_without_targets_ahead_the_heads_do_not_run(make_model, batch):
    _, model = make_model({"mtp": {"heads": 1}})
    _, plain = make_model()
    plain.load_state_dict({name: value for name, value in model.state_dict().items() if not name.startswith("mtp.")})
    given = {"positions": batch.positions, "mask": Mask(documents=batch.documents)}
    assert plain.mtp is None and not any(name.startswith("mtp") for name in plain.state_dict())
    out = model(batch.tokens, targets=batch.targets, **given)
    assert out.keys() == {"ce_sum"} and torch.equal(out["ce_sum"], plain(batch.tokens, targets=batch.targets, **given)["ce_sum"])
    assert torch.equal(cross_entropy(out), out["ce_sum"])
    assert torch.equal(model(batch.tokens, **given)["logits"], plain(batch.tokens, **given)["logits"])
    for wrong, ahead in ((model, [shifted(batch, 1)] * 2), (plain, [shifted(batch, 1)])):
        with pytest.raises(ValueError, match=r"`ahead` holds \d .* model\.mtp\.heads is [01]"):
            wrong(batch.tokens, targets=batch.targets, ahead=ahead, **given)


def test_the_future_beyond_the_token_ahead_is_not_seen(make_model, batch):
    """Head 1 at position i reads tokens up to i + 1; the token that it is to predict must not reach it."""
    _, model = make_model({"mtp": {"heads": 1}})
    given = {"positions": batch.positions, "mask": Mask(documents=batch.documents)}

    def loss_at(tokens, i):
        changed = batch_of(tokens)
        only = torch.full_like(changed.targets, -100)
        ahead, _ = shifted(changed, 1)
        only[1, i] = 3  # a fixed answer, so that the loss depends on what is read alone
        with torch.no_grad():
            return model(tokens, targets=changed.targets, ahead=[(ahead, only)], **given)["mtp_ce_sum"]

    other = batch.tokens.clone()
    other[1, 12:] = (other[1, 12:] + 1) % 61
    assert torch.equal(loss_at(batch.tokens, 10), loss_at(other, 10))
    assert not torch.equal(loss_at(batch.tokens, 11), loss_at(other, 11))


@pytest.mark.parametrize("case", CASES)
def test_parameters_and_flops(case, make_model):
    cfg, model = make_model(CASES[case])
    counts = count_parameters(cfg)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    assert counts["total"] == counts["active"] == sum(sizes.values())
    assert counts["mtp"] == sum(size for name, size in sizes.items() if name.startswith("mtp."))
    plain = cfg.model_copy(update={"mtp": cfg.mtp.model_copy(update={"heads": 0})})
    added = flops_per_token(cfg, 48) - flops_per_token(plain, 48)
    block = flops_per_token(plain.model_copy(update={"layers": 4}), 48) - flops_per_token(plain, 48)
    assert added == cfg.mtp.heads * (block + 6 * (2 * 32 * 32 + 61 * 32))  # a block, the projection, the head once more


def test_the_objective_weighs_the_sums():
    out = {"ce_sum": torch.tensor(10.0), "mtp_ce_sum": torch.tensor(6.0), "mtp_weight": 0.25}
    assert cross_entropy(out).item() == 11.5
    assert cross_entropy({"ce_sum": torch.tensor(2.0)}).item() == 2.0
