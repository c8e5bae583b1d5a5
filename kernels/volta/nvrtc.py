"""The kernels compiled by NVRTC, NVIDIA's run-time compiler: no CUDA toolkit, and for a cubin no GPU either.

NVRTC 12 is the last that knows sm_70 (`pip install "nvidia-cuda-nvrtc-cu12==12.9.*"`; CUDA builds of PyTorch up to cu12x bring one).
"""

import ctypes
import importlib.util
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from llmtrain_kernels.volta.sources import FOLDER, cached, fingerprint

OLDEST = 70
"""The architecture that the kernels are written for."""


class Nvrtc:
    """The loaded library; its calls raise RuntimeError with what it says."""

    def __init__(self, library: ctypes.CDLL):
        self.library = library

    def call(self, name: str, *arguments: object) -> None:
        code = getattr(self.library, f"nvrtc{name}")(*arguments)
        if code:
            text = self.library.nvrtcGetErrorString
            text.restype = ctypes.c_char_p
            raise RuntimeError(f"nvrtc{name}: {text(code).decode()}")

    @property
    def version(self) -> tuple[int, int]:
        numbers = ctypes.c_int(), ctypes.c_int()
        self.call("Version", *map(ctypes.byref, numbers))
        return numbers[0].value, numbers[1].value

    @property
    def architectures(self) -> list[int]:
        """Those it compiles for: 70 is sm_70."""
        count = ctypes.c_int()
        self.call("GetNumSupportedArchs", ctypes.byref(count))
        found = (ctypes.c_int * count.value)()
        self.call("GetSupportedArchs", found)
        return list(found)

    def text(self, program: ctypes.c_void_p, what: str) -> bytes:
        """The log, PTX or CUBIN of a program."""
        size = ctypes.c_size_t()
        self.call(f"Get{what}Size", program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        self.call(f"Get{what}", program, buffer)
        return buffer.raw

    def compile(self, source: bytes, options: list[str], what: str) -> bytes:
        """Compiled `source` as `what`: CUBIN or PTX. Raises RuntimeError with the compiler's messages."""
        program = ctypes.c_void_p()
        self.call("CreateProgram", ctypes.byref(program), source, b"attention.cu", 0, None, None)
        try:
            self.call("CompileProgram", program, len(options), (ctypes.c_char_p * len(options))(*(x.encode() for x in options)))
            return self.text(program, what)
        except RuntimeError as error:
            raise RuntimeError(f"the Volta kernels: {error}\n{self.text(program, 'ProgramLog').decode()[-2000:]}") from error
        finally:
            self.call("DestroyProgram", ctypes.byref(program))


def _candidates() -> Iterator[str]:
    spec = importlib.util.find_spec("nvidia")
    folders = [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec else []
    for major in (12, 13):
        for folder in folders:
            yield from map(str, sorted(folder.glob(f"*/lib/libnvrtc.so.{major}")))
        yield f"libnvrtc.so.{major}"


@cache
def nvrtc() -> Nvrtc | None:
    """The first NVRTC found, version 12 before 13: in the packages of Python, then where the system looks. None without one."""
    for path in _candidates():
        try:
            return Nvrtc(ctypes.CDLL(path))
        except OSError:
            continue
    return None


def build(width: int, architecture: str, folder: Path = FOLDER) -> Path:
    """The kernels for one head dim: a cubin for `sm_70` or another real architecture, PTX for `compute_70` or another virtual one.

    Kept in the user's cache folder. Raises RuntimeError without NVRTC, or with its messages.
    """
    found = nvrtc()
    if found is None:
        raise RuntimeError('the Volta kernels are compiled by NVRTC, which is not here: pip install "nvidia-cuda-nvrtc-cu12==12.9.*"')
    what = "CUBIN" if architecture.startswith("sm_") else "PTX"
    options = [f"--gpu-architecture={architecture}", f"--include-path={folder}", "--std=c++17", f"-DHEAD_DIM={width}"]
    name = fingerprint(folder, (options[0], *options[2:], found.version))
    source = (folder / "attention.cu").read_bytes()
    return cached(name, f".{what.lower()}", lambda: found.compile(source, options, what))
