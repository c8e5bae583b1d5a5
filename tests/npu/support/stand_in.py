"""A stand-in for an NPU: the real torch_npu over host memory, so that this project's NPU code runs on a machine without one.

`start()` once per process, before anything imports torch_npu. What is real: torch_npu's Python, its op schemas, shapes, autograd and
(with `kernels=False`) op-plugin's checks of arguments. What is not: the kernels' arithmetic, HCCL, asynchrony, memory limits, speed.
With kernels, `npu::` ops are the plain formulas of `npu_references.py` and `npu_collective_references.py` (each a dict REFERENCES of op
name -> function of CPU tensors over the same bytes), and one without a formula raises. `calls` counts every op that was called.
"""

import atexit
import functools
import importlib
import json
import os
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

REFERENCES = ("npu_references", "npu_collective_references")
BOOKKEEPING = tuple(f"npu::{name}" for name in ("get_", "empty_with", "unsafe_empty_with", "npu_format_cast", "npu_change_data_ptr"))
"""Ops on formats and storages: torch_npu's own."""
calls: Counter[str] = Counter()
"""How often each `npu::` op was called in this process, without that prefix, and those of aten that are counted, with theirs."""
_libraries: list = []
_started: list[tuple[bool, bool]] = []


def start(*, kernels: bool = True, hccl: bool = True) -> None:
    """Make `import torch_npu` work here and bring it up.

    kernels: aten and `npu::` ops compute, on the CPU; without, torch_npu's own C++ runs up to the kernels, which do nothing.
    hccl: groups of that name are carried by gloo.
    """
    if _started:
        if _started[0] != (kernels, hccl):
            raise RuntimeError(
                f"the stand-in runs with (kernels, hccl) = {_started[0]} in this process; {(kernels, hccl)} needs another one"
            )
        return
    _started.append((kernels, hccl))
    prepare()
    importlib.import_module("torch_npu")
    bring_up(kernels=kernels, hccl=hccl)


def started() -> bool:
    """Whether `start` has been called in this process; its choices then hold."""
    return bool(_started)


def prepare() -> None:
    """What has to happen before torch_npu is imported."""
    os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    import cann_stubs

    cann_stubs.load()


def bring_up(*, kernels: bool, hccl: bool) -> None:
    """What has to happen after torch_npu is imported."""
    if kernels:
        import npu_kernels

        npu_kernels.install(calls)
        _install_references()
    if hccl:
        import hccl_over_gloo

        hccl_over_gloo.install()
    if "NPU_CALLS" in os.environ:
        atexit.register(write_calls)


def write_calls() -> None:
    """Write `calls` to $NPU_CALLS/rank-R.json, or alone.json for a process that is no rank."""
    folder = Path(os.environ["NPU_CALLS"])
    folder.mkdir(parents=True, exist_ok=True)
    name = f"rank-{os.environ['RANK']}" if "RANK" in os.environ else "alone"
    (folder / f"{name}.json").write_text(json.dumps(calls, indent=1, sort_keys=True))


def _install_references() -> None:
    import npu_kernels
    import torch

    library = torch.library.Library("npu", "IMPL")
    _libraries.append(library)
    found: dict[str, Callable] = dict(npu_kernels.BEHIND_ATEN)
    for module in REFERENCES:
        found |= _references(module)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # every one says that it replaces a kernel
        for name in sorted({*found, *_ops_without(found)}):
            library.impl(name, _counted(name, found.get(name)), "PrivateUse1", allow_override=True)


def _references(module: str) -> dict[str, Callable]:
    try:
        return importlib.import_module(module).REFERENCES
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        return {}


def _ops_without(found: dict[str, Callable]) -> list[str]:
    """`npu::` ops with a kernel in torch_npu and no formula here: their kernels would leave memory as it is, and nobody would notice."""
    import npu_kernels
    import torch

    schemas = [schema for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("npu::")]
    names = [npu_kernels.full_name(schema) for schema in schemas if not schema.name.startswith(BOOKKEEPING)]
    return [name.removeprefix("npu::") for name in names if npu_kernels.has_npu_kernel(name) and name.removeprefix("npu::") not in found]


def _counted(name: str, reference: Callable | None) -> Callable:
    import npu_kernels

    if reference is None:

        def missing(*args: Any, **kwargs: Any) -> None:
            raise NotImplementedError(f"npu::{name} has no formula in {' or '.join(f'{module}.py' for module in REFERENCES)}")

        return missing
    kernel = npu_kernels.carried_out(reference)

    @functools.wraps(reference)
    def counted(*args: Any, **kwargs: Any) -> Any:
        calls[name] += 1
        return kernel(*args, **kwargs)

    return counted
