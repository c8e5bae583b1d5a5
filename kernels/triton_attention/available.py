"""Whether Triton can serve a kind of device here, and which chip it is; found without importing Triton."""

import importlib.util
import os
from importlib import metadata

import numpy
import torch
from llmtrain_kernels.triton_attention import tiles

INTERPRETER = "TRITON_INTERPRET"


def unavailable(device: str) -> str | None:
    """Why kernels written in Triton cannot run on `device` (cpu, cuda or npu) in this process, or None if nothing is known against it."""
    if importlib.util.find_spec("triton") is None:
        package = "triton-ascend==3.2.0" if device == "npu" else "triton"
        return f"needs the package {package}"
    interpreted = os.environ.get(INTERPRETER) == "1"
    if device == "cpu" and not interpreted:
        return f"runs on the CPU in Triton's interpreter only, a thousand times slower: for tests, {INTERPRETER}=1 before the start"
    if device != "cpu" and interpreted:
        return f"would be interpreted: {INTERPRETER}=1 is set"
    return _interpreter_fault() if interpreted else None


def _interpreter_fault() -> str | None:
    """Until 3.7, Triton's interpreter makes indices of arrays of one element, as NumPy until 2.4 allowed."""
    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:  # triton-ascend, which asks for NumPy 1
        return None
    if _release(triton) >= (3, 7) or _release(numpy.__version__) < (2, 4):
        return None
    return f"the interpreter of Triton {triton} does not work with NumPy {numpy.__version__}: pip install 'numpy<2.4' or a newer Triton"


def _release(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def chip(kind: str, index: int | None = None) -> str:
    """The key of the tables of tiles for a device of a kind, the current one by default; a key that they may lack."""
    if kind == "cpu":
        return "interpreter"
    if kind == "cuda":
        return tiles.cuda_chip(torch.cuda.get_device_capability(index))
    module = torch.get_device_module(kind)
    return tiles.ascend_chip(module.get_device_name(module.current_device() if index is None else index))
