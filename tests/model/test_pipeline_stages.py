"""A model cut into stages, one after the other in one process, computes what the whole one does."""

import copy
import math

import pytest
import torch

from llmtrain.data.batch import Batch
from llmtrain.data.shifted import shifted
from llmtrain.model import cross_entropy, initialise, set_post_norm_gamma
from llmtrain.model.transformer import cut
from llmtrain.ops import Mask

CASES = {
    "rope": {},
    "learned positions": {"position": {"kind": "learned"}, "attention": {"heads": 4}},
    "tied": {"tie_embeddings": True},
    "sandwich": {"norm": {"placement": "depth_scaled_sandwich"}},
    "mtp": {"mtp": {"heads": 2}},
    "mtp, tied": {"mtp": {"heads": 1}, "tie_embeddings": True},
    "moe": {"ffn": {"kind": "moe", "experts": 4, "top_k": 2, "hidden": 12}},
}
CUTS = {
    "even": (range(1), range(1, 2), range(2, 3)),
    "uneven": (range(2), range(2, 3)),
    "ends alone": (range(0), range(3), range(3, 3)),
}
DOCUMENTS = ((5, 19), (24,))
POSITIONS = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in DOCUMENTS])


def stages_of(model, ranges) -> list:
    parts = [copy.deepcopy(model) for _ in ranges]
    for at, (part, blocks) in enumerate(zip(parts, ranges)):
        cut(part, blocks=blocks, first=at == 0, last=at == len(ranges) - 1)
    return parts


def chain(parts, tokens, **last):
    x = tokens
    for part in parts:
        given = last if part.last_stage else {}
        out = part(x, positions=POSITIONS, mask=Mask(documents=DOCUMENTS), **given)
        x = out.get("hidden")
    return out


@pytest.mark.parametrize("how", CUTS)
@pytest.mark.parametrize("case", CASES)
def test_loss_logits_and_gradients_of_the_chain_are_those_of_the_whole(case, how, make_model, tokens):
    cfg, model = make_model(CASES[case])
    parts = stages_of(model, CUTS[how])
    targets = tokens.roll(-1, 1).masked_fill(torch.arange(24) % 5 == 0, -100)
    batch = Batch(tokens, targets, POSITIONS, DOCUMENTS, samples=(0, 1))
    given = {"targets": targets, "ahead": [shifted(batch, n) for n in range(1, cfg.mtp.heads + 1)]}
    out = model(tokens, positions=POSITIONS, mask=Mask(documents=DOCUMENTS), **given)
    whole = cross_entropy(out)
    whole.backward()
    got = chain(parts, tokens, **given)
    assert got.keys() == out.keys() == ({"ce_sum", "mtp_ce_sum", "mtp_weight"} if cfg.mtp.heads else {"ce_sum"})
    torch.testing.assert_close(cross_entropy(got), whole, rtol=1e-13, atol=0)
    cross_entropy(got).backward()
    expected = dict(model.named_parameters())
    held = [(name, p) for part in parts for name, p in part.named_parameters()]
    assert {name for name, _ in held} == expected.keys()
    gradients = {name: sum(p.grad for other, p in held if other == name) for name in expected}
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name].grad, rtol=1e-11, atol=1e-12, msg=name)
    with torch.no_grad():
        torch.testing.assert_close(
            chain(parts, tokens)["logits"], model(tokens, positions=POSITIONS, mask=Mask(documents=DOCUMENTS))["logits"]
        )


def test_what_a_stage_holds(make_model):
    _, model = make_model()
    first, middle, last = stages_of(model, CUTS["even"])
    assert {n.split(".")[0] for n, _ in first.named_parameters()} == {"embedding", "blocks"} and list(first.blocks) == ["0"]
    assert {n.split(".")[0] for n, _ in middle.named_parameters()} == {"blocks"} and list(middle.blocks) == ["1"]
    assert {n.split(".")[0] for n, _ in last.named_parameters()} == {"blocks", "final_norm", "head"} and list(last.blocks) == ["2"]
    _, tied = make_model(CASES["tied"])
    first, _, last = stages_of(tied, CUTS["even"])
    assert last.head.weight is last.embedding.weight and "embedding.weight" in dict(last.named_parameters())
    last.to(torch.float32)
    assert last.head.weight is last.embedding.weight and first.head is None


def test_a_stage_starts_from_the_weights_of_the_whole_model(make_model):
    cfg, model = make_model(CASES["sandwich"])
    _, last = stages_of(model, CUTS["uneven"])
    for part in (model, last):
        initialise(part, cfg, seed=5)
    whole = dict(model.named_parameters())
    assert all(torch.equal(parameter, whole[name]) for name, parameter in last.named_parameters())
    set_post_norm_gamma(last, 0.6, 0.9)
    assert (last.blocks["2"].post_ffn_norm.weight == 0.9 / math.sqrt(3)).all()


def test_stages_share_one_rotation_and_a_later_one_does_not_guess_positions(make_model, tokens):
    _, model = make_model()
    first, last = stages_of(model, CUTS["uneven"])
    with torch.no_grad():
        rope = first.rotation(POSITIONS, torch.float64)
        hidden = first(tokens, positions=POSITIONS, rope=rope, mask=Mask(documents=DOCUMENTS))["hidden"]
        got = last(hidden, rope=rope, mask=Mask(documents=DOCUMENTS))["logits"]
        torch.testing.assert_close(got, model(tokens, positions=POSITIONS, mask=Mask(documents=DOCUMENTS))["logits"])
        with pytest.raises(ValueError, match="needs `positions` or `rope`"):
            last(hidden, mask=Mask())
