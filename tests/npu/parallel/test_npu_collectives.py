"""Products joined with collectives by torch_npu's operators: in worlds of 2 NPUs against formulas in float64, and their calls alone against
the wheel's schemas, shapes and checks."""

import pytest
import stand_in

stand_in.start()

import checks  # noqa: E402
import collective_cases  # noqa: E402
import npu_table  # noqa: E402
import schemas  # noqa: E402
import torch  # noqa: E402
from collective_faults import EXPERTS, FAULTS, GATHER, SCATTER  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402

from llmtrain.compat import fake_world  # noqa: E402

BOUNDS = {"fp32": 2e-6, "bf16": 2e-2, "fp16": 2.5e-3}
"""As a share of the largest number. bf16 has 8 bits: a unit of rounding is 4e-3, and parts of a sum are rounded before they are added. fp16
has 11 bits, an eighth of that."""

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
    "fused_experts, fp16": {"check": EXPERTS, "dtype": "fp16", "sizes": [7, 12]},
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
BY_EXPERT = "counts by expert first"
RUN = {"no fault": EXPERTS, BY_EXPERT: EXPERTS} | {fault.name: fault.check for fault in FAULTS}
"""Faults, and none, that are run in a world -> the check that is run with them."""
OFF = 1e-2
"""From where on a difference in float32 is noticed."""


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
    faults = {fault: faulty(fault, check) for fault, check in RUN.items()}
    return npu_world("collective_world:in_world", 2, cases=CASES | faults)


@pytest.mark.parametrize("case", cells(["numerics", "gradients", "2-process"]))
def test_results_and_gradients_are_those_of_the_formulas(case, two):
    bound = BOUNDS[CASES[case]["dtype"]]
    assert {name: value for name, value in two[case]["differences"].items() if not value < bound} == {}
    assert all(two[case]["calls"].get(name, 0) for name in OPERATORS[CASES[case]["check"]])


def off(differences: dict[str, float]) -> list[str]:
    """The columns that a world of two gives, where they notice; a call that is refused is noticed by both."""
    results = {name for name, value in differences.items() if value > OFF}
    numerics = any(name.startswith(("out", "refused")) for name in results)
    return ["numerics"] * numerics + ["gradients"] * any(not name.startswith("out") for name in results)


def test_no_fault_is_no_fault(two):
    assert max(two["no fault"]["differences"].values()) < BOUNDS["fp32"]


def recording(seen: list[checks.Seen], change=lambda name, operator: operator):
    """For `checks.between`: notes every call in `seen`, after `change`."""

    def note(name, operator):
        def call(*args, **options):
            seen.append(checks.Seen(name, args, options))
            return operator(*args, **options)

        return change(name, call)

    return note


def without_kernels(fault) -> list[str]:
    """The columns that this process gives, where some call of the fault's operators is noticed."""
    found, seen = set(), []
    with checks.between(recording(seen, fault.change)):
        for case in (case for case in collective_cases.CASES if case.wrapper in fault.wrappers):
            try:
                on_fakes(case)
            except Exception:  # whatever goes wrong is noticed
                found.add("fake")
    found |= {"schema" for call in seen if schemas.problem(call, schemas.loaded())}
    return [column for column in ("schema", "fake") if column in found]


@pytest.fixture(scope="module")
def noticed(two, host):
    """Fault -> (wrappers, columns that notice it)."""
    found = {BY_EXPERT: (["alltoallv_matmul", "matmul_alltoallv"], off(two[BY_EXPERT]["differences"]))}
    for fault in FAULTS:
        columns = [*without_kernels(fault), *(["host"] if host[fault.name] else []), *off(two[fault.name]["differences"])]
        found[fault.name] = fault.wrappers, columns
    return found


@pytest.mark.parametrize("fault", [name for name in RUN if name != "no fault"])
def test_every_fault_is_noticed(fault, noticed):
    assert noticed[fault][1], f"{fault}: nothing notices"


def test_the_page_shows_the_faults(noticed, request):
    rows = [f"| {', '.join(wrappers)} | {name} | {', '.join(columns)} |" for name, (wrappers, columns) in noticed.items()]
    table = "\n".join(["| wrapper | mistake | noticed by |", "|---|---|---|", *sorted(rows)])
    if request.config.getoption("--write-table", default=False):
        npu_table.replace("faults", table)
    assert npu_table.section("faults") == table, "docs/npu-checks.md is not up to date: make test-npu ARGS=--write-table"


def on_fakes(case) -> None:
    """A case on fake tensors; AssertionError for other shapes than its own."""
    with fake_world(0, collective_cases.RANKS), FakeTensorMode(allow_non_fake_inputs=True):
        outs = case.call(lambda *sizes: torch.empty(sizes, dtype=torch.bfloat16, device="npu"))
        assert [tuple(out.shape) for out in outs] == case.shapes
        assert all(out.device.type == "npu" and out.dtype == torch.bfloat16 for out in outs)


@pytest.mark.parametrize("case", calls("fake"))
def test_shapes_are_those_of_the_meta_kernels(case):
    on_fakes(case)


@pytest.mark.parametrize("case", calls("schema"))
def test_calls_fit_the_schemas(case):
    """Of the torch_npu here and of the other versions."""
    seen = []
    with checks.between(recording(seen)):
        on_fakes(case)
    assert seen
    assert schemas.problems(seen) == []


@pytest.fixture(scope="module")
def host():
    """What torch_npu's own C++ says to every call, and to every fault."""
    return checks.host("collective_host.py")


@pytest.mark.parametrize("case", calls("host"))
def test_the_checks_in_cpp_pass(case, host):
    assert host[case.name] == ""


def test_the_checks_in_cpp_see_matrices_that_are_none(host):
    assert "required to be 2D" in host["rows of three dims"] and "Dimension out of range" in host["matrices of too few dims"]
