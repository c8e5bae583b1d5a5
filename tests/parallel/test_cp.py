"""Context parallelism in worlds of 2 and 4 processes: equal to one process, in float64, whatever the documents."""

import pytest
from cp_world import SIZES
from worlds import run_world

KINDS = ("all_gather", "ring", "ulysses")
LAYOUTS = {
    "documents that divide": ((16, 8, 24, 40),),
    "one document, two rows": ((64,), (64,)),
    "documents that do not divide": ((5, 9, 3, 30),),
    "rows of their own": ((7, 6), (13,), (13,), (1, 12)),
    "documents of one token": ((5, 1, 1, 6), (1,) * 13),
    "a token for some ranks only": ((2, 1), (3,)),
}
VARIANTS = {
    "": {},
    "multiple of 4": {"multiple": 4},
    "narrow values": {"sizes": {"dv": 5}},
    "wide values": {"sizes": {"dv": 12}},
    "one key head": {"sizes": {"kv_heads": 1}},
    "as many key heads": {"sizes": {"kv_heads": 4}},
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
}
WINDOW = {"window of 5": {"window": 5}}
PARTS = {"reference parts": {"kernels": {"attention_part": "reference", "attention_part_backward": "reference"}}}
LIMITS = {"float64": 1e-12, "float32": 2e-6, "bfloat16": 3e-2}
CASES = {
    f"{kind}, {layout}{', ' if name else ''}{name}": {"kind": kind, "documents": documents} | variant
    for kind in KINDS
    for layout, documents in LAYOUTS.items()
    for name, variant in (VARIANTS | (PARTS if kind == "ring" else WINDOW)).items()
}


FAULTS = {("merge", "ring"): ("dv",), ("passing", "ring"): ("out", "dq"), ("scatter", "all_gather"): ("out", "dq")}
"""What a fault leaves right: gradients of values follow from the log-sum-exps alone."""

DOCUMENTS = ((20, 28), (7, 1, 1, 39))
MODELS = [
    *({"kind": kind, "documents": documents} for kind in KINDS for documents in (DOCUMENTS, None)),
    *({"kind": kind, "documents": DOCUMENTS, "recompute": how} for kind in KINDS for how in ("full", "selective")),
    {"kind": "all_gather", "documents": DOCUMENTS, "changes": {"attention": {"heads": 4, "kv_heads": 2, "window": 9}}},
    {"kind": "ring", "documents": DOCUMENTS, "changes": {"position": {"kind": "learned"}}},
    {"kind": "ring", "documents": DOCUMENTS, "changes": {"mtp": {"heads": 1}}},
    {"kind": "all_gather", "documents": None, "length": 46},
]
TRAFFIC = [{"kind": kind, "documents": ((96,), (40, 56)), "dtype": dtype} for kind in KINDS for dtype in ("float32", "bfloat16")]
TOY = ((16, 8, 24, 40),)


@pytest.fixture(scope="module", params=[2, 4])
def world(request, tmp_path_factory):
    """The number of ranks, and what all of the jobs gave in one world of them."""
    jobs = {"attention": ("differences", {"cases": list(CASES.values())}), "models": ("models", {"cases": MODELS})}
    jobs |= {fault: ("differences", {"cases": [{"kind": kind, "documents": TOY}], "fault": fault}) for fault, kind in FAULTS}
    jobs |= {"traffic": ("traffic", {"cases": TRAFFIC}), "refusals": ("refusals", {})}
    return request.param, run_world("cp_world:in_world", request.param, args={"jobs": jobs}, folder=tmp_path_factory.mktemp("cp"))


@pytest.mark.parametrize("name", CASES)
def test_attention_over_ranks_is_attention(world, name):
    found = dict(zip(CASES, world[1]["attention"], strict=True))[name]
    assert max(found.values()) < LIMITS[CASES[name].get("dtype", "float64")], found


@pytest.mark.parametrize(("fault", "kind"), FAULTS)
def test_a_fault_is_seen(world, fault, kind):
    (found,) = world[1][fault]
    assert {name for name, difference in found.items() if difference < 1e-12} == set(FAULTS[fault, kind]), found


def test_a_models_loss_logits_and_gradients_are_one_processes(world):
    for case, found in zip(MODELS, world[1]["models"], strict=True):
        assert max(found[name] for name in ("loss", "logits", "gradients")) < 1e-11, (case, found)
        assert found["layouts"] == 1, "three layers, forward and backward, and the joining of logits share one"


def expected_bytes(kind, ranks, itemsize):
    """The formulas of docs/context-parallel.md, for two rows of 96 tokens."""
    places, (heads, kv_heads, d, dv) = 2 * 96 // ranks, SIZES.values()
    keys = places * kv_heads * (d + dv)
    if kind == "all_gather":
        return (ranks - 1) * keys * itemsize, (ranks - 1) * keys * itemsize
    if kind == "ring":
        return (ranks - 1) * keys * itemsize, (ranks - 1) * keys * (itemsize + max(itemsize, 4))
    moved = places * (heads + max(kv_heads, ranks)) * (d + dv) * itemsize * (ranks - 1) // ranks
    return moved, moved


def test_bytes_sent_are_the_documented_ones(world):
    ranks, results = world
    calls = {"all_gather": 2, "ring": 3 * (ranks - 1), "ulysses": 4}
    for case, found in zip(TRAFFIC, results["traffic"], strict=True):
        forward, backward = expected_bytes(case["kind"], ranks, {"float32": 4, "bfloat16": 2}[case["dtype"]])
        assert (found["forward"], found["backward"]) == (forward, backward), case
        assert len(found["calls"]) == calls[case["kind"]], found["calls"]


def test_what_a_kind_cannot_serve_is_refused_with_the_option_to_change(world):
    ranks, results = world
    said = [
        ("parallel.cp_kind=spiral", "all_gather, ring, ulysses"),
        ("model.attention.window=8", "parallel.cp_kind: all_gather"),
        ("model.attention.heads 6 / parallel.tp 2 = 3", f"parallel.cp {ranks}", "parallel.cp_kind: all_gather or ring"),
        ("key-value cache", "parallel.cp: 1"),
        ("needs the documents that ContextParallel.split gave",),
        ("3 queries", f"hold {8 // ranks} on a rank"),
    ]
    for message, words in zip(results["refusals"], said, strict=True):
        assert all(word in message for word in words), message
