"""What compilers say of kernels for chips that are not here. As a script: the Volta kernels alone, for the Python that has NVRTC."""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SUPPORT = ROOT / "tests/kernels/support"
sys.path.insert(0, str(SUPPORT))

import cuda_tools  # noqa: E402
import llmtrain_kernels  # noqa: E402
from llmtrain_kernels.volta.nvrtc import OLDEST, build, nvrtc  # noqa: E402

MAKE = "`make test-kernels` makes one"


def kernels_python() -> Path:
    """The Python of `make test-kernels`, which has Triton and NVRTC; without it this one, which may have them."""
    other = ROOT / ".kernels-venv/bin/python"
    return other if other.exists() else Path(sys.executable)


def volta(python: Path) -> list[str]:
    """The Volta kernels for sm_70, or what is missing."""
    done = _run([python, __file__])
    return json.loads(done.stdout) if done.returncode == 0 else _not_compiled(done)


def _volta() -> list[str]:
    found = nvrtc()
    if found is None or OLDEST not in found.architectures:
        return [f"not compiled: needs NVRTC 12.9, the last that knows sm_70, in an environment with it ({MAKE})"]
    return [f"head dim {width}, NVRTC {'.'.join(map(str, found.version))}: {_machine_code(build(width, 'sm_70'))}" for width in (64, 128)]


def _machine_code(cubin: Path) -> str:
    if cuda_tools.tool("nvdisasm") is None:
        return f"compiled, not looked into: no disassembler in this environment ({MAKE})"
    code = cuda_tools.run("nvdisasm", "-c", cubin)
    products, spills = len(re.findall(r"HMMA\.884", code)), len(re.findall(r"\b(?:LDL|STL)\b", code))
    registers = max(int(number) for number in re.findall(r"REG:(\d+)", cuda_tools.run("cuobjdump", "-res-usage", cubin)))
    return f"{products:,} HMMA.884 in all kernels, at most {registers} registers, {spills} accesses of spilled registers"


def triton_cuda(python: Path) -> list[str]:
    """The shipped tiles of the Triton kernels for sm_90 in bf16, by ptxas, or what is missing."""
    done = _run([python, SUPPORT / "compile_cuda.py", "90", "bf16"])
    if done.returncode:
        return _not_compiled(done)
    return [
        f"{tile['kernel']}, head dims {tile['d']} and {tile['dv']}: wgmma {'yes' if 'wgmma' in str(tile['products']) else 'no'}, "
        f"{tile['shared'] >> 10} KiB of shared memory, {tile['registers']} registers, {tile['spilled']} bytes spilled"
        for tile in json.loads(done.stdout)
    ]


FIT = """
from llmtrain_kernels.triton_attention.ascend import misfit
from llmtrain_kernels.triton_attention.tiles import tile
for kernel in ("forward", "backward_q", "backward_kv"):
    size = tile("Ascend910B", kernel, d=128, dv=128, itemsize=2)
    print(f"{kernel}, head dim 128, {size.queries} x {size.keys}:", misfit(kernel, size, d=128, dv=128) or "fits")
"""


def triton_ascend() -> list[str]:
    """Whether the shipped tiles of head dim 128 fit an Ascend 910B2, by its compiler, or what is missing."""
    python = Path(os.environ.get("LLMTRAIN_ASCEND_PYTHON", ROOT / ".ascend-venv/bin/python"))
    if not python.exists():
        return [f"not compiled: needs an environment with triton-ascend ({MAKE}; LLMTRAIN_ASCEND_PYTHON names another)"]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "llmtrain_kernels").symlink_to(Path(llmtrain_kernels.__file__).parent)
        done = _run([python, "-c", FIT], PYTHONPATH=folder, TRITON_CACHE_DIR=str(Path(folder, "cache")))
    return done.stdout.splitlines() if done.returncode == 0 else _not_compiled(done)


def _run(command: list, **more: str) -> subprocess.CompletedProcess:
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(command, capture_output=True, text=True, env=kept | more)


def _not_compiled(done: subprocess.CompletedProcess) -> list[str]:
    return [f"not compiled: {(done.stderr.strip().splitlines() or [f'exit code {done.returncode}'])[-1]} ({MAKE})"]


if __name__ == "__main__":
    print(json.dumps(_volta()))
