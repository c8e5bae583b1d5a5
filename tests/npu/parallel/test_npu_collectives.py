"""Products joined with collectives by torch_npu's operators: in worlds of 2 NPUs against formulas in float64, and their calls alone against
the wheel's schemas, shapes and checks."""

from pathlib import Path

import pytest
import stand_in

stand_in.start()

import checks  # noqa: E402
import collective_cases  # noqa: E402
import schemas  # noqa: E402
import torch  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402

from llmtrain.compat import fake_world  # noqa: E402

SUPPORT = Path(__file__).parents[1] / "support"

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
WRAPPERS = {
    GATHER: ["all_gather_matmul"],
    SCATTER: ["matmul_reduce_scatter"],
    EXPERTS: ["alltoallv_matmul", "matmul_alltoallv"],
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
    "transposed weight of a pair": GATHER,
    "counts by expert first": EXPERTS,
}


def faulty(fault: str, check: str) -> dict:
    shape = {"sizes": [7, 12], "width": 8} if check == EXPERTS else {"batch": 2, "length": 8}
    return {"check": "faulty", "fault": fault, "of": check, "dtype": "fp32", **shape}


def cells(columns: list[str]):
    """The cases with the cells of the table that they fill."""
    marks = {
        name: [pytest.mark.npu_check(wrapper, column) for wrapper in WRAPPERS[case["check"]] for column in columns]
        for name, case in CASES.items()
    }
    return [pytest.param(name, marks=marks[name]) for name in CASES]


def calls(column: str):
    """The calls of operators, each with its cell."""
    return [pytest.param(c, id=c.name, marks=pytest.mark.npu_check(c.wrapper, column)) for c in collective_cases.CASES]


@pytest.fixture(scope="module")
def two(npu_world):
    faults = {fault: faulty(fault, check) for fault, check in FAULTS.items()}
    return npu_world("collective_world:in_world", 2, cases=CASES | faults)


@pytest.mark.parametrize("case", cells(["numerics", "gradients", "2-process"]))
def test_results_and_gradients_are_those_of_the_formulas(case, two):
    bound = BOUNDS[CASES[case]["dtype"]]
    assert {name: value for name, value in two[case]["differences"].items() if not value < bound} == {}
    assert all(two[case]["calls"].get(name, 0) for name in OPERATORS[CASES[case]["check"]])


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_seen(fault, two):
    worst = two[fault]["differences"]["worst"]
    assert worst < 2e-6 if fault == "no fault" else worst > 1e-2


@pytest.mark.parametrize("case", calls("fake"))
def test_shapes_are_those_of_the_meta_kernels(case):
    with fake_world(0, collective_cases.RANKS), FakeTensorMode(allow_non_fake_inputs=True):
        outs = case.call(lambda *sizes: torch.empty(sizes, dtype=torch.bfloat16, device="npu"))
        assert [tuple(out.shape) for out in outs] == case.shapes
        assert all(out.device.type == "npu" and out.dtype == torch.bfloat16 for out in outs)


@pytest.mark.parametrize("case", calls("schema"))
def test_calls_fit_the_schemas(case):
    """Of the torch_npu here and of the other versions; where one has no such operator, it has no wrapper either."""
    seen = []

    def note(name, operator):
        def call(*args, **options):
            seen.append(checks.Seen(name, args, options))
            return operator(*args, **options)

        return call

    with fake_world(0, collective_cases.RANKS), checks.between(note), FakeTensorMode(allow_non_fake_inputs=True):
        case.call(lambda *sizes: torch.empty(sizes, dtype=torch.bfloat16, device="npu"))
    assert seen
    assert schemas.problems(seen) == []


@pytest.fixture(scope="module")
def host():
    """What torch_npu's own C++ says to every call, and to faults in the first of each wrapper."""
    return checks.host("collective_host.py")


@pytest.mark.parametrize("case", calls("host"))
def test_the_checks_in_cpp_pass(case, host):
    assert host[case.name] == ""


def test_the_checks_in_cpp_see_matrices_that_are_none(host):
    assert "required to be 2D" in host["all_gather_matmul: rows of three dims"]
    assert "required to be 2D" in host["matmul_reduce_scatter: rows of three dims"]
    for wrapper in ("alltoallv_matmul", "matmul_alltoallv"):
        assert "Dimension out of range" in host[f"{wrapper}: matrices of too few dims"]
