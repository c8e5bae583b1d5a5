"""Every wrapper of llmtrain/ops/npu in every column that one process gives, and mistakes that some column has to catch.

The stand-in computes, so what is checked is how the operators are called and put together: not kernels, which no test here runs.
"""

from collections import Counter
from pathlib import Path

import pytest
import stand_in

stand_in.start()

import checks  # noqa: E402
import formulas  # noqa: E402
import npu_table  # noqa: E402
import schemas  # noqa: E402
import torch  # noqa: E402
from cases import BY_NAME, CASES, WRAPPERS  # noqa: E402
from mutations import MUTATIONS  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402

from llmtrain.ops import Call, choose, implementations, op_names  # noqa: E402
from llmtrain.ops.npu import attention  # noqa: E402
from llmtrain.ops.npu.gateway import NAME  # noqa: E402

SUPPORT = Path(__file__).parents[1] / "support"
COLUMNS = ("schema", "fake", "host", "numerics", "gradients")


def cells(column, cases=CASES):
    """The cases, each with the cells of the table that it fills."""
    return [pytest.param(c, id=c.name, marks=[pytest.mark.npu_check(name, column) for name in (c.wrapper, *c.also)]) for c in cases]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def host():
    """What torch_npu's own C++ says to every case and mutation: name -> refusal, or nothing."""
    return checks.host("host_process.py")


@pytest.mark.parametrize("case", cells("schema"))
def test_calls_fit_the_schemas(case):
    """Of the torch_npu here and of the other versions."""
    assert schemas.problems(checks.recorded(case)) == []


@pytest.mark.parametrize("case", cells("fake"))
def test_fake_tensors_have_the_shapes(case):
    for dtype in case.dtypes:
        checks.fake(case, dtype)


@pytest.mark.parametrize("case", cells("host"))
def test_the_checks_in_cpp_pass(case, host):
    assert host[case.name] == ""


@pytest.mark.parametrize("case", cells("numerics"))
def test_numerics_are_the_formula(case):
    for dtype in case.dtypes:
        checks.numerics(case, dtype)


@pytest.mark.parametrize("case", cells("gradients", [case for case in CASES if case.gradients]))
def test_gradients_are_those_of_the_formula(case):
    for dtype in case.dtypes:
        checks.gradients(case, dtype)


@pytest.fixture(scope="module")
def caught():
    """Name of a mistake -> (wrapper, columns that noticed it), as the tests find out."""
    return {}


def catches(mutation, host) -> list[str]:
    """The columns that notice."""
    case, found, seen = BY_NAME[mutation.case], [], []
    graph = BY_NAME[case.graph] if case.graph else case

    def note(name, operator):
        def call(*args, **kwargs):
            seen.append(checks.Seen(name, args, kwargs))
            return operator(*args, **kwargs)

        return mutation.change(name, call)

    for column, check in (("fake", checks.fake), ("numerics", checks.numerics), ("gradients", checks.gradients)):
        if column == "gradients" and not graph.gradients:
            continue
        with checks.between(note):
            try:
                check(graph if column == "gradients" else case, torch.float32)
            except Exception:  # whatever goes wrong is noticed
                found.append(column)
    if any(schemas.problem(call, schemas.loaded()) for call in seen):
        found.append("schema")
    if host[mutation.name]:
        found.append("host")
    return sorted(found, key=COLUMNS.index)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.name)
def test_every_mistake_is_caught(mutation, host, caught):
    columns = catches(mutation, host)
    caught[mutation.name] = (BY_NAME[mutation.case].wrapper, columns)
    assert columns, f"{mutation.name}: nothing notices"


def test_every_wrapper_and_column_has_its_mistakes_and_the_page_shows_them(caught, request):
    if len(caught) < len(MUTATIONS):
        pytest.skip("needs all mistakes to have been tried in this process")
    rows = [f"| {wrapper} | {name} | {', '.join(columns)} |" for name, (wrapper, columns) in sorted(caught.items(), key=lambda i: i[1][0])]
    table = "\n".join(["| wrapper | mistake | noticed by |", "|---|---|---|", *rows])
    if request.config.getoption("--write-table", default=False):
        npu_table.replace("mistakes", table)
    assert npu_table.section("mistakes") == table, "docs/npu-checks.md is not up to date: make test-npu ARGS=--write-table"
    assert {wrapper for wrapper, _ in caught.values()} == set(WRAPPERS)
    assert set(Counter(column for _, columns in caught.values() for column in columns)) == set(COLUMNS)


def test_more_documents_than_a_call_takes(monkeypatch):
    monkeypatch.setattr(attention, "MOST_DOCUMENTS", 2)
    assert sum(seen.op == "npu_fusion_attention" for seen in checks.recorded(BY_NAME["attention-documents-window"])) == 2
    checks.numerics(BY_NAME["attention-documents-window"], torch.float32)
    checks.gradients(BY_NAME["attention-documents-window"], torch.float32)
    checks.numerics(BY_NAME["attention-documents-lse"], torch.float32)


@pytest.mark.npu_check("adamw", "host")
def test_the_fused_optimizer_is_a_kernel_of_the_npu(host):
    """Without one, torch.optim.AdamW(fused=True) would run on the CPU."""
    assert host["adamw"] == "" and host["adamw kernel"]


def fused_adamw(weight, grads: list, **options) -> str:
    """Steps of what `auto` takes on an NPU, whose name is returned."""
    choice = choose("adamw", Call(device="npu", dtype=torch.bfloat16, parameter_dtype=torch.float32))
    optimizer = choice.function([{"params": [weight], "weight_decay": 0.1}], **options)
    for grad in grads:
        weight.grad = grad.float().to(weight.device)
        optimizer.step()
    return choice.name


ADAMW = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-3}


@pytest.mark.npu_check("adamw", "numerics")
def test_steps_of_the_optimizer_are_the_formula():
    torch.manual_seed(0)
    start, grads = torch.randn(4, 3, dtype=torch.float64), [torch.randn(4, 3, dtype=torch.float64) for _ in range(3)]
    weight = torch.nn.Parameter(start.float().npu())
    assert fused_adamw(weight, grads, **ADAMW) == "fused"
    exact = formulas.adamw(start.float().double(), [grad.float().double() for grad in grads], decay=0.1, **ADAMW)
    checks.compare("adamw", weight, exact, 2e-6)


@pytest.mark.npu_check("adamw", "fake")
def test_the_optimizer_steps_fake_tensors():
    with FakeTensorMode():
        weight = torch.nn.Parameter(torch.empty(4, 3, device="npu"))
        assert fused_adamw(weight, [torch.empty(4, 3)], **ADAMW) == "fused"
        assert weight.shape == (4, 3) and weight.device.type == "npu"


@pytest.mark.parametrize("op", [op for op in op_names() if NAME in [entry.name for entry in implementations(op)]])
def test_auto_takes_the_fused_operator_and_a_case_checks_it(op):
    assert choose(op, Call(device="npu", dtype=torch.bfloat16)).name == NAME
    assert any(case.wrapper == op and case.called_by_models for case in CASES)
