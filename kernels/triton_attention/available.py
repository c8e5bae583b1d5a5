"""Whether Triton can serve a kind of device here, found without importing it."""

import importlib.util
import os

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
