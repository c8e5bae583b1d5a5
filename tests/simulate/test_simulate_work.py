"""The operators that are priced, against what `config` counts of the same model, and the papers' own figures."""

import pytest

from llmtrain.config.model import ModelConfig
from llmtrain.config.parameters import count_parameters, flops_per_token
from llmtrain.hardware import load
from llmtrain.simulate.blocks import block_work, head_work
from llmtrain.simulate.case import Case
from llmtrain.simulate.habits import Habits
from llmtrain.simulate.held import rank_held
from llmtrain.simulate.links import Group, seconds
from llmtrain.simulate.memory import memory
from llmtrain.simulate.rates import Rates, machine
from llmtrain.simulate.step import price
from llmtrain.simulate.work import ATTENTION

LLAMA = ModelConfig(preset="llama3_8b")
EXPERTS = ModelConfig(preset="mixtral_8x7b")
LATENT = ModelConfig(preset="deepseek_v3")


def case(model: ModelConfig = LLAMA, **values: object) -> Case:
    return Case(model=model, hardware=load("h100-80"), **values)


def product_flops(one: Case) -> float:
    """Of all blocks and the head, forward and backward, on one rank."""
    dense = one.model.ffn.dense_layers if one.model.ffn.kind == "moe" else one.model.layers
    total = 0.0
    for count, kind in ((dense, True), (one.model.layers - dense, False)):
        if count:
            work = block_work(one, dense=kind)
            total += count * sum(item.flops for item in work.forward + work.inputs + work.weights if item.kind != ATTENTION)
    head = head_work(one)
    return total + sum(item.flops for item in head.forward + head.inputs + head.weights)


@pytest.mark.parametrize("model", [LLAMA, EXPERTS, LATENT], ids=["llama", "mixtral", "deepseek"])
def test_products_are_those_of_the_parameter_count(model):
    """6 FLOPs per weight and token, but for the router, which is priced as memory, and padding to tiles."""
    one = case(model, seq_len=4096)
    attention = 6 * model.layers * model.attention.heads * (model.head_dim + model.value_head_dim) * (4096 + 1) / 2
    router = 6 * model.hidden * model.ffn.experts * model.expert_layers if model.ffn.kind == "moe" else 0
    wanted = (flops_per_token(model, 4096) - attention - router) * 4096
    assert product_flops(one) == pytest.approx(wanted, rel=2e-3)


@pytest.mark.parametrize("axis", ["tp", "cp"])
def test_axes_share_the_products(axis):
    assert product_flops(case(**{axis: 4})) == pytest.approx(product_flops(case()) / 4, rel=1e-6)


def test_experts_are_shared_by_ep_and_not_computed_more():
    whole, shared = case(EXPERTS), case(EXPERTS, ep=8, dp=8)
    assert product_flops(shared) == pytest.approx(product_flops(whole), rel=1e-6)
    sends = {send.name: send for send in block_work(shared, dense=False).forward_sends}
    assert sends["dispatch"].size == 4096 * 2 * 4096 * 2 and sends["combine"].size == sends["dispatch"].size


def test_parameters_add_up():
    for model in (LLAMA, EXPERTS, LATENT):
        one = case(model, tp=1, pp=4, dp=8, virtual=2)
        assert sum(rank_held(one, rank).all for rank in range(4)) == pytest.approx(count_parameters(model)["total"], rel=1e-5)


@pytest.mark.parametrize(("recompute", "what"), [(set(), 0), ({"full"}, 1), ({"attention"}, 0.03)])
def test_recomputation_takes_as_long_as_it_computes(recompute, what):
    """`full` repeats the forward pass; FlashAttention repeats nothing that `attention` names but itself."""
    plain, again = (block_work(case(recompute=frozenset(names)), dense=True) for names in (set(), recompute))
    forward = sum(item.flops for item in plain.forward)
    assert sum(item.flops for item in again.again) / forward == pytest.approx(what, abs=0.12)


def test_a_ring_crosses_nodes_by_all_their_ports():
    """Eight ranks of a node share eight ports; one rank has one."""
    made = machine(load("h100-80"), Rates(contention_nvidia=1e-9), dtype="bfloat16", fused=True)
    alone, together = (seconds(made, Group(16, inside), "all_gather", 1e9) for inside in (1, 8))
    assert alone > 5 * together
    assert seconds(made, Group(1, 1), "all_gather", 1e9) == 0


def test_dispatch_once_per_node_sends_less():
    made = machine(load("h100-80"), Rates(), dtype="bfloat16", fused=True)
    often, once = (seconds(made, Group(32, 8), kind, 1e9, copies=8) for kind in ("all_to_all", "once_per_node"))
    assert once < 0.7 * often


def test_more_of_anything_is_never_slower():
    one = case(tp=4, pp=2, dp=8, micros=8, shard="zero1")
    base = price(one, Rates()).seconds
    for name in ("peak", "memory_bandwidth", "links"):
        hardware, value = one.hardware, getattr(one.hardware, name)
        faster = (
            {key: item.model_copy(update={"value": 2 * item.value}) for key, item in value.items()}
            if isinstance(value, dict)
            else value.model_copy(update={"value": 2 * value.value})
        )
        assert price(one.with_(hardware=hardware.model_copy(update={name: faster})), Rates()).seconds < base


def test_parts_add_up_to_the_step():
    for one in (case(pp=4, virtual=2, micros=16, tp=2, dp=2), case(EXPERTS, ep=8, dp=8, micros=2, shard="zero3"), case()):
        step = price(one, Rates())
        assert sum(step.parts.values()) == pytest.approx(step.seconds, rel=1e-9)
        assert all(value >= 0 for value in step.parts.values())


def test_activations_are_the_papers():
    """arXiv 2205.05198, section 4: s b h (34 + 5 a s / h) bytes of a block, s b h (10 + 24 / t + 5 a s / (h t)) under tp alone, all over t
    with sequence parallelism, less the last term with selective recomputation, 2 s b h with full."""
    values = {"vocab_size": 51200, "layers": 1, "hidden": 6144, "max_seq_len": 2048, "attention": {"heads": 64}}
    values |= {"ffn": {"hidden": 24576, "activation": "gelu"}}
    s, b, h, a, t = 2048, 4, 6144, 64, 8
    for spread, recompute, per in [
        (False, set(), 10 + 24 / t + 5 * a * s / (h * t)),
        (True, set(), (34 + 5 * a * s / h) / t),
        (False, {"attention"}, 10 + 24 / t),
        (True, {"attention"}, 34 / t),
        (False, {"full"}, 2),
    ]:
        habits = Habits(flash=False, dropout=True, tp_ranks_share_input=spread)
        one = case(
            ModelConfig.model_validate(values),
            seq_len=s,
            micro_batch=b,
            tp=t,
            dtype="float16",
            habits=habits,
            recompute=frozenset(recompute),
        )
        ends = 2 * 2 * s * b * h / (t if spread else 1)
        assert memory(one)[0].activations - ends == pytest.approx(s * b * h * per, rel=1e-3)


def test_eighteen_bytes_a_parameter_without_zero():
    """16-bit weight, fp32 gradient, fp32 master and two moments (arXiv 1910.02054, section 3.1, with fp32 gradients)."""
    one = case()
    held = memory(one)[0]
    assert held.parameters + held.gradients + held.optimizer == pytest.approx(18 * count_parameters(LLAMA)["total"], rel=1e-5)
