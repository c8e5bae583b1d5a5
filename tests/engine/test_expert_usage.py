"""The engine's losses and biases that balance experts, against formulas over all tokens of a step at once."""

import pytest
import torch
from sameness import Documents, build_engine, merge

from llmtrain.config.run import RunConfig
from llmtrain.layout.steps import StepPlan
from llmtrain.train.stream import micro_batches

E, K = 4, 2
BASE = {
    "model": {"vocab_size": 61, "layers": 2, "hidden": 16, "attention": {"heads": 4, "kv_heads": 2}, "init": {"std": 0.3}},
    "train": {"steps": 3, "seq_len": 24, "global_batch": 8, "micro_batch": 2},
    "precision": "fp64",
}


@pytest.fixture(autouse=True, scope="module")
def world():
    """The engines share one, of this process alone."""
    yield
    torch.distributed.destroy_process_group()


def engine_and_batches(changes: dict, **train):
    ffn = merge({"kind": "moe", "experts": E, "top_k": K, "hidden": 12}, changes)
    cfg = RunConfig.model_validate(merge(BASE, {"model": {"ffn": ffn}, "train": train}))
    plan = StepPlan.from_config(cfg)
    return build_engine(cfg), [micro_batches(plan.step(i), Documents(), rank=0, ranks=1) for i in range(plan.steps)]


def scores_of_step(engine, batches) -> list[torch.Tensor]:
    """Of every layer the normalised scores [8,24,E], with their graph."""
    found: dict[int, list] = {0: [], 1: []}
    model = engine.stages.parts[0]
    hooks = [
        block.ffn.router.register_forward_hook(lambda _m, _a, choice, i=i: found[i].append(choice))
        for i, block in enumerate(model.blocks.values())
    ]
    for micro in engine._prepared(batches):
        engine.stages._call(0, micro, None, targets=True)
    for hook in hooks:
        hook.remove()
    return [[torch.cat([getattr(c, name) for c in found[i]]).view(8, 24, -1) for name in ("scores", "ids", "logits")] for i in (0, 1)]


@pytest.mark.parametrize(("sequences", "groups"), [(1, 8), (2, 4), (4, 2), ("step", 1)])
def test_the_loss_is_the_formula_over_the_union_of_a_groups_tokens(sequences, groups):
    weight, z = 0.7, 0.3
    options = {"balance": {"weight": weight, "sequences": sequences}, "router": {"z_loss": z}}
    engine, (batches, *_) = engine_and_batches(options)
    result = engine.forward_backward(batches)
    got = {name: parameter.grad.clone() for name, parameter in engine.parameters.items()}
    plain, _ = engine_and_batches({})
    plain.forward_backward(batches)
    expected = 0.0
    for scores, ids, logits in scores_of_step(engine, batches):
        chosen = torch.nn.functional.one_hot(ids, E).sum(2).double()
        for s, c in zip(scores.chunk(groups), chosen.chunk(groups)):
            tokens = s.shape[0] * s.shape[1]
            f = E / (K * tokens) * c.sum((0, 1))  # papers' equation, without gradient
            p = s.sum((0, 1)) / tokens
            expected = expected + weight * (f * p).sum() / groups
        expected = expected + z * logits.logsumexp(-1).square().mean()
    assert result.metrics["balance_loss"] == pytest.approx(expected.item(), rel=1e-12)
    engine.discard()
    slopes = torch.autograd.grad(expected, list(engine.parameters.values()), allow_unused=True)
    for (name, parameter), slope in zip(plain.parameters.items(), slopes):
        whole = parameter.grad if slope is None else parameter.grad + slope
        torch.testing.assert_close(got[name], whole, rtol=1e-9, atol=1e-12, msg=name)


def test_loads_are_those_of_the_step():
    engine, (batches, *_) = engine_and_batches({"capacity": {"factor": 0.5}})
    metrics = engine.forward_backward(batches).metrics["experts"]
    for layer, (_, ids, _) in enumerate(scores_of_step(engine, batches)):
        counts = torch.bincount(ids.flatten(), minlength=E).double()
        shares = counts / counts.sum()
        assert metrics["load"][layer] == pytest.approx(float(counts.max() / counts.mean()), abs=1e-6)
        assert metrics["entropy"][layer] == pytest.approx(float(-(shares * shares.log()).sum() / torch.tensor(E).log()), abs=1e-6)
        assert 0 < metrics["dropped"][layer] < 1


def test_a_bias_moves_once_a_step_towards_experts_with_too_few_tokens():
    rate = 0.25
    engine, steps = engine_and_batches({"router": {"score": "sigmoid", "bias_rate": rate}})
    routers = [block.ffn.router for block in engine.stages.parts[0].blocks.values()]
    assert all(router.bias.tolist() == [0.0] * E for router in routers)
    expected = [torch.zeros(E, dtype=torch.float64) for _ in routers]
    for index, batches in enumerate(steps):
        for bias, (_, ids, _) in zip(expected, scores_of_step(engine, batches)):
            counts = torch.bincount(ids.flatten(), minlength=E)
            bias += 0 if index == 1 else rate * (counts.sum() / E - counts).sign()  # step 1 is discarded
        engine.forward_backward(batches)
        engine.discard() if index == 1 else engine.apply(lr=0.01)
        assert [router.bias.tolist() for router in routers] == [bias.tolist() for bias in expected]
    state = engine.state()
    assert state["blocks.1.ffn.router.bias.weight"].tolist() == expected[1].tolist()
    other, _ = engine_and_batches({"router": {"score": "sigmoid", "bias_rate": rate}})
    other.load_state(state)
    assert other.stages.parts[0].blocks["1"].ffn.router.bias.tolist() == expected[1].tolist()


def test_recomputation_changes_nothing():
    options = {"balance": {"sequences": 4}, "router": {"z_loss": 0.1}}
    found = []
    for recompute in ("none", "full", "selective"):
        engine, (batches, *_) = engine_and_batches(options, recompute=recompute)
        result = engine.forward_backward(batches)
        found.append((result.loss_sum, result.metrics["balance_loss"], engine.grad_norm()))
    assert found[0] == found[1] == found[2]
