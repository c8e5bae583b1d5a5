"""The kernels on an NVIDIA GPU, through the driver's own interface: compiled by NVRTC on the machine, launched in torch's stream.

Not run on hardware.
"""

import ctypes
from functools import cache

import torch
from llmtrain_kernels.volta.arguments import THREADS, Launch
from llmtrain_kernels.volta.nvrtc import OLDEST, build, nvrtc

MAX_DYNAMIC_SHARED = 8
"""CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES: beyond 48 KiB a kernel has to ask."""


@cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _call(name: str, *arguments: object) -> None:
    code = getattr(_driver(), name)(*arguments)
    if code:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(code, ctypes.byref(text))
        raise RuntimeError(f"the Volta kernels: {name}: {(text.value or b'unknown').decode()} ({code})")


def architecture(capability: tuple[int, int]) -> str:
    """What to compile for: machine code on Volta, elsewhere PTX of the oldest architecture that this NVRTC knows."""
    found = nvrtc()
    known = found.architectures if found else [OLDEST]
    own = 10 * capability[0] + capability[1]
    if own == OLDEST and OLDEST not in known:
        raise RuntimeError(f'NVRTC {found.version[0]} no longer knows sm_70: pip install "nvidia-cuda-nvrtc-cu12==12.9.*"')
    return "sm_70" if own == OLDEST else f"compute_{max(OLDEST, min(known))}"


@cache
def _function(name: str, width: int, device: int, shared: int) -> ctypes.c_void_p:
    """A kernel in the context of a device, allowed its shared memory. The context is torch's and has to be current."""
    binary = build(width, architecture(torch.cuda.get_device_capability(device))).read_bytes()
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    _call("cuModuleLoadData", ctypes.byref(module), binary)
    _call("cuModuleGetFunction", ctypes.byref(function), module, name.encode())
    _call("cuFuncSetAttribute", function, MAX_DYNAMIC_SHARED, shared)
    return function


def launch(call: Launch) -> None:
    """Put a launch into torch's current stream. Raises RuntimeError with the driver's or NVRTC's message."""
    device = call.writes[0].device
    with torch.cuda.device(device):
        function = _function(call.kernel.name, call.width, device.index, call.shared_bytes)
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(call.arguments))
        stream = ctypes.c_void_p(torch.cuda.current_stream(device).cuda_stream)
        _call("cuLaunchKernel", function, *call.blocks, THREADS, 1, 1, call.shared_bytes, stream, pointers, None)
