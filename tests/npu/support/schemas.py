"""Calls against op schemas: those of the torch_npu here, and of other versions as their wheels print them (`schemas/*.txt`)."""

from functools import cache
from pathlib import Path
from typing import Any

import torch
from checks import Seen
from torch import Tensor

FOLDER = Path(__file__).parents[1] / "schemas"
VERSIONS = sorted(path.stem.removeprefix("torch_npu-") for path in FOLDER.glob("torch_npu-*.txt"))
TYPES = {
    "Tensor": Tensor,
    "int": int,
    "SymInt": int,
    "float": (int, float),
    "bool": bool,
    "str": str,
    "number": (int, float),
    "ScalarType": torch.dtype,
}


@cache
def loaded() -> dict[str, Any]:
    """Default overloads of the torch_npu that is loaded."""
    return {s.name: s for s in torch._C._jit_get_all_schemas() if s.name.startswith("npu::") and not s.overload_name}


@cache
def stored(version: str) -> dict[str, Any]:
    """Default overloads of another version. What this torch cannot parse has names of types that nobody here passes; it is left out."""
    found = {}
    for line in (FOLDER / f"torch_npu-{version}.txt").read_text().splitlines():
        name = line.split("(")[0]
        if line.startswith("npu::npu_") and "." not in name:
            found[name] = torch._C.parse_schema(line)
    return found


ABSENT: dict[str, set[str]] = {}
"""By version, operators that it may lack: their wrapper's probe refuses there, and docs/npu.md says so. Today none."""


def problems(calls: list[Seen]) -> list[str]:
    """Why the torch_npu here, or another version, would not take these calls."""
    known = {"loaded": loaded(), **{version: stored(version) for version in VERSIONS}}
    found = [
        (version, problem(call, schemas)) for version, schemas in known.items() for call in calls if call.op not in ABSENT.get(version, ())
    ]
    return [f"{version}: {p}" for version, p in found if p]


def problem(seen: Seen, schemas: dict[str, Any]) -> str | None:
    """Why the operator would not take a call, or None."""
    schema = schemas.get(f"npu::{seen.op}")
    if schema is None:
        return f"{seen.op} does not exist"
    arguments = {argument.name: argument for argument in schema.arguments}
    positional = [argument.name for argument in schema.arguments if not argument.kwarg_only]
    if len(seen.args) > len(positional):
        return f"{seen.op} takes {len(positional)} positional arguments, not {len(seen.args)}"
    given = dict(zip(positional, seen.args))
    for name, value in seen.kwargs.items():
        if name in given:
            return f"{seen.op}: {name} is given twice"
        given[name] = value
    for name, value in given.items():
        if name not in arguments:
            return f"{seen.op} has no argument {name}"
        if not fits(value, str(arguments[name].type)):
            return f"{seen.op}: {name} is {type(value).__name__}, not {arguments[name].type}"
    missing = [a.name for a in schema.arguments if a.name not in given and not a.has_default_value()]
    return f"{seen.op}: {', '.join(missing)} missing" if missing else None


def fits(value: Any, kind: str) -> bool:
    """Whether a Python value is of a schema type such as Optional[List[int]]."""
    if kind.startswith("Optional["):
        return value is None or fits(value, kind[9:-1])
    if kind.startswith("List["):
        return isinstance(value, list | tuple) and all(fits(item, kind[5:-1]) for item in value)
    if isinstance(value, bool) and kind != "bool":
        return False
    return isinstance(value, TYPES[kind])
