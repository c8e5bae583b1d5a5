"""Expert parallelism in real worlds: every rank's outputs and all gradients are those of one rank over all tokens."""

import pytest
import torch
from worlds import run_world

LAYER, MODEL = "layer_equals_one_rank", "model_equals_one_rank"
BIGMAC = {"descend": 4, "shared_experts": 2, "capacity": {}}
NODES = {"ep": 4, "inner": 2, "sizes": [7, 12, 3, 5]}
TWO = {
    "ep 2": {"check": LAYER, "ep": 2, "sizes": [7, 12]},
    "gelu": {"check": LAYER, "ep": 2, "sizes": [7, 12], "ffn": {"activation": "gelu"}},
    "experts without tokens": {"check": LAYER, "ep": 2, "sizes": [9, 4], "avoided": [0, 1, 2, 5]},
    "a rank that receives nothing": {"check": LAYER, "ep": 2, "sizes": [9, 4], "avoided": [4, 5, 6, 7]},
    "nothing, fp32": {"check": LAYER, "ep": 2, "sizes": [9, 4], "avoided": [4, 5, 6, 7], "dtype": torch.float32},
    "one token": {"check": LAYER, "ep": 2, "sizes": [1, 1]},
    "etp 2": {"check": LAYER, "ep": 1, "etp": 2, "sizes": [6, 6]},
    "dropped, shared, BigMac": {"check": LAYER, "ep": 2, "sizes": [7, 12], "ffn": BIGMAC},
    "two in flight": {"check": "two_in_flight", "ep": 2},
    "events": {"check": "order_of_events", "ep": 2},
    "model": {"check": MODEL, "ep": 2},
    "model, recomputed": {"check": MODEL, "ep": 2, "recompute": "full"},
    "refusals": {"check": "refusals"},
}
FOUR = {
    "ep 4": {"check": LAYER, "ep": 4, "sizes": [7, 12, 3, 5]},
    "two ranks that receive nothing": {"check": LAYER, "ep": 4, "sizes": [7, 12, 3, 5], "avoided": [0, 1, 4, 5, 6]},
    "ep 2, replicated": {"check": LAYER, "ep": 2, "sizes": [7, 12, 3, 5]},
    "ep 2, fsdp": {"check": LAYER, "ep": 2, "sizes": [7, 12, 3, 5], "fsdp": True},
    "ep 2 x etp 2": {"check": LAYER, "ep": 2, "etp": 2, "sizes": [6, 6, 9, 9]},
    "ep 2 x etp 2, nothing": {"check": LAYER, "ep": 2, "etp": 2, "sizes": [6, 6, 9, 9], "avoided": [0, 1, 2, 3]},
    "etp 2, fsdp": {"check": LAYER, "ep": 1, "etp": 2, "sizes": [6, 6, 9, 9], "fsdp": True},
    "model, ep 2 x etp 2": {"check": MODEL, "ep": 2, "etp": 2},
    "model, ep 2, fsdp": {"check": MODEL, "ep": 2, "fsdp": True, "recompute": "full"},
    "nodes": {"check": LAYER} | NODES,
    "nodes, experts without tokens": {"check": LAYER, "avoided": [0, 2, 3, 5]} | NODES,
    "nodes, one that receives nothing": {"check": LAYER, "avoided": [4, 5, 6, 7]} | NODES,
    "nodes, dropped, shared, BigMac": {"check": LAYER, "ffn": BIGMAC} | NODES,
    "nodes, fp32": {"check": LAYER, "dtype": torch.float32} | NODES,
    "nodes of one rank": {"check": LAYER} | NODES | {"inner": 1},
    "nodes, etp 2": {"check": LAYER, "ep": 2, "etp": 2, "inner": 1, "sizes": [6, 6, 9, 9]},
    "nodes, two in flight": {"check": "two_in_flight", "ep": 4, "inner": 2},
    "nodes, events": {"check": "order_of_events", "ep": 4, "inner": 2},
    "nodes, vectors": {"check": "vectors_between_nodes", "k": 4, "tokens": 8},
    "model, nodes, recomputed": {"check": MODEL, "ep": 4, "inner": 2, "recompute": "full"},
}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return run_world("ep_world:run", 2, args={"cases": TWO}, folder=tmp_path_factory.mktemp("ep2"))


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    return run_world("ep_world:run", 4, args={"cases": FOUR}, folder=tmp_path_factory.mktemp("ep4"))


def holds(found: dict, bound: float) -> None:
    assert found["norm"] > 0.1
    assert {name: value for name, value in found["differences"].items() if not value < bound * max(1.0, found["norm"])} == {}


@pytest.mark.parametrize("case", [name for name, values in TWO.items() if values["check"] == LAYER])
def test_two_ranks_compute_what_one_does(case, two):
    holds(two[case], 1e-4 if "fp32" in case else 1e-12)
    if "nothing" in case:
        assert two[case]["rows"] == [26, 0]


@pytest.mark.parametrize("case", [name for name, values in FOUR.items() if values["check"] == LAYER])
def test_four_ranks_compute_what_one_does(case, four):
    holds(four[case], 1e-4 if "fp32" in case else 1e-12)
    if "two ranks" in case:
        assert four[case]["rows"][0] == four[case]["rows"][2] == 0 and min(four[case]["rows"][1::2]) > 0


@pytest.mark.parametrize("case", ["two in flight", "nodes, two in flight"])
def test_two_micro_batches_may_be_in_flight(case, two, four):
    found = (two if case in two else four)[case]
    assert "waited for twice" in found.pop("twice")
    assert max(found.values()) < 1e-13


@pytest.mark.parametrize("case", [name for name, values in (TWO | FOUR).items() if values["check"] == MODEL])
def test_a_model_starts_from_the_same_weights_and_has_the_same_gradients(case, two, four):
    found = (two if case in two else four)[case]
    assert found["weights"] == 0.0
    assert {name: value for name, value in found.items() if not value < 1e-10} == {}


def test_what_cannot_be_shared_out_is_refused_with_the_arithmetic(two):
    assert "parallel.ep 2 does not divide model.ffn.experts 7: 7 / 2 = 3.50" in two["refusals"]["experts"]
    assert "parallel.etp 2 does not divide model.ffn.hidden 21" in two["refusals"]["width"]


def test_the_shared_expert_runs_while_rows_travel_and_its_backward_while_their_gradients_do(two, four):
    begins, ends = "all_to_all begins", "all_to_all ends"
    forward = [begins, "shared expert", ends, "experts", begins, ends]
    backward = [begins, ends, "experts backward", begins, "shared expert backward", ends]
    assert two["events"] == forward + backward
    out, back = (["all_gather begins", "all_gather ends"], ["reduce_scatter begins", "reduce_scatter ends"])
    assert four["nodes, events"] == out + forward + back + out + backward + back


def test_hierarchical_dispatch_sends_a_vector_once_to_another_node_whatever_the_number_of_experts(four):
    """8 tokens of 4 choices over 2 nodes: N k (n - 1) / n vectors each way and pass, or N (n - 1)."""
    tokens, k, nodes = 8, 4, 2
    found = four["nodes, vectors"]
    assert found["all_to_all"] == {"all_to_all": 4 * tokens * k * (nodes - 1) // nodes}
    assert found["hierarchical"] == {"all_gather": 2 * tokens * (nodes - 1), "reduce_scatter": 2 * tokens * (nodes - 1), "all_to_all": 0}
