"""Whether Triton can serve a kind of device here, and which chip it is; found without importing Triton."""

import importlib.util
import os

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
    return None


def chip(kind: str, index: int | None = None) -> str:
    """The key of the tables of tiles for a device of a kind, the current one by default; a key that they may lack."""
    if kind == "cpu":
        return "interpreter"
    if kind == "cuda":
        return tiles.cuda_chip(torch.cuda.get_device_capability(index))
    module = torch.get_device_module(kind)
    return tiles.ascend_chip(module.get_device_name(module.current_device() if index is None else index))
