"""Products joined with collectives by torch_npu's operators, in worlds of 2 NPUs, against formulas in float64."""

import pytest

GATHER, SCATTER, EXPERTS = "gather_matmul", "matmul_scatter", "fused_experts"
BOUNDS = {"fp32": 2e-6, "bf16": 2e-2}
"""As a share of the largest number. bf16 has 8 bits: a unit of rounding is 4e-3, and parts of a sum are rounded before they are added."""

CASES = {
    f"{check}, {name}, {dtype}": {"check": check, "dtype": dtype, **shape}
    for dtype in BOUNDS
    for check in (GATHER, SCATTER)
    for name, shape in {"one row": {"batch": 1, "length": 8}, "several rows": {"batch": 3, "length": 10}}.items()
}
CASES["gather_matmul, no biases, fp32"] = {"check": GATHER, "dtype": "fp32", "batch": 2, "length": 6, "bias": False}
CASES |= {
    "fused_experts, fp32": {"check": EXPERTS, "dtype": "fp32", "sizes": [7, 12]},
    "fused_experts, bf16": {"check": EXPERTS, "dtype": "bf16", "sizes": [7, 12]},
    "fused_experts, gelu, fp32": {"check": EXPERTS, "dtype": "fp32", "sizes": [7, 12], "activation": "gelu"},
    "fused_experts, an expert without tokens, fp32": {"check": EXPERTS, "dtype": "fp32", "sizes": [9, 4], "avoided": (2,)},
    "fused_experts, a rank that receives nothing, fp32": {"check": EXPERTS, "dtype": "fp32", "sizes": [9, 4], "avoided": (0, 1)},
    "fused_experts, one token, fp32": {"check": EXPERTS, "dtype": "fp32", "sizes": [1, 1]},
    "fused_experts, cast by FSDP2, bf16": {"check": EXPERTS, "dtype": "bf16", "sizes": [7, 12], "sharded": True},
}
OPERATORS = {
    GATHER: ("npu_all_gather_base_mm", "npu_mm_reduce_scatter_base"),
    SCATTER: ("npu_all_gather_base_mm", "npu_mm_reduce_scatter_base"),
    EXPERTS: ("npu_alltoallv_gmm", "npu_gmm_alltoallv"),
}
FAULTS = {
    "no fault": EXPERTS,
    "swapped counts, there": EXPERTS,
    "swapped counts, back": EXPERTS,
    "wrong world size of a pair": GATHER,
    "wrong world size of an exchange": EXPERTS,
    "wrong gather index": GATHER,
    "mean for sum": SCATTER,
    "transposed weights of experts": EXPERTS,
    "counts by expert first": EXPERTS,
}


def faulty(fault: str, check: str) -> dict:
    shape = {"sizes": [7, 12]} if check == EXPERTS else {"batch": 2, "length": 8}
    return {"check": "faulty", "fault": fault, "of": check, "dtype": "fp32", **shape}


@pytest.fixture(scope="module")
def two(npu_world):
    faults = {fault: faulty(fault, check) for fault, check in FAULTS.items()}
    return npu_world("collective_world:in_world", 2, cases=CASES | faults)


@pytest.mark.parametrize("case", CASES)
def test_results_and_gradients_are_those_of_the_formulas(case, two):
    bound = BOUNDS[CASES[case]["dtype"]]
    assert {name: value for name, value in two[case]["differences"].items() if not value < bound} == {}
    assert all(two[case]["calls"].get(name, 0) for name in OPERATORS[CASES[case]["check"]])


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_seen(fault, two):
    worst = two[fault]["differences"]["worst"]
    assert worst < 2e-6 if fault == "no fault" else worst > 1e-2
