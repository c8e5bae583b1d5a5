"""The stored schemas of torch_npu are those of the wheels: the file of the version here is compared with what it registers."""

import importlib.metadata
import importlib.util
from pathlib import Path

import dump_schemas
import pytest
import stand_in

stand_in.start()

import schemas  # noqa: E402
import torch  # noqa: E402

FOLDER = Path(__file__).parent / "schemas"
VERSION = importlib.metadata.version("torch_npu")
FROM_PYTHON = {
    "npu::print_npugraph_tensor",
    "npu::save_npugraph_tensor",
    "npu::set_op_timeout_ms",
    "npu::super_kernel_scope_begin",
    "npu::super_kernel_scope_end",
}
"""Operators that torch_npu registers from Python: its library does not hold them."""


def stored(version: str) -> list[str]:
    return (FOLDER / f"torch_npu-{version}.txt").read_text().splitlines()


def test_the_file_is_what_this_torch_npu_registers():
    registered = {schema.name: [] for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("npu::")}
    for schema in torch._C._jit_get_all_schemas():
        if schema.name in registered:
            registered[schema.name].append(str(schema))
    left_out = registered.keys() & FROM_PYTHON
    assert left_out == FROM_PYTHON
    assert stored(VERSION) == sorted(text for name, texts in registered.items() if name not in left_out for text in texts)


def test_the_file_is_what_the_command_reads_out_of_the_library():
    library = Path(importlib.util.find_spec("torch_npu").origin).parents[1] / dump_schemas.LIBRARY
    assert stored(VERSION) == dump_schemas.schemas(library.read_bytes())


@pytest.mark.parametrize("version", [path.stem.removeprefix("torch_npu-") for path in sorted(FOLDER.glob("*.txt"))])
def test_a_file_holds_schemas_that_this_torch_can_read(version):
    lines = stored(version)
    assert len(lines) > 300 and lines == sorted(set(lines))
    assert [str(torch._C.parse_schema(line)) for line in lines] == lines


def test_an_operator_that_another_version_lacks_is_a_problem(monkeypatch):
    call = schemas.Seen("npu_moe_gating_top_k_of_tomorrow", (), {})
    lacking = [f"{version}: npu_moe_gating_top_k_of_tomorrow does not exist" for version in ("loaded", *schemas.VERSIONS)]
    assert schemas.problems([call]) == lacking and not schemas.ABSENT
    monkeypatch.setitem(schemas.ABSENT, schemas.VERSIONS[0], {call.op})
    assert schemas.problems([call]) == [line for line in lacking if not line.startswith(schemas.VERSIONS[0])]
