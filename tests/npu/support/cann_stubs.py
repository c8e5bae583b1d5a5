"""Builds and loads small libraries in the place of CANN's, so that the real torch_npu imports on a machine without CANN.

Every symbol that torch_npu needs and nothing provides becomes a function that returns 0 (success), but for those that `acl.c` carries
out over host memory. Every `aclnn*` name in torch_npu becomes one too: op-plugin's C++ then runs its argument checks and output shapes for
real, while nothing computes. Built once by gcc (seconds) and kept in torch_npu's environment, by a hash of the sources and its version.
"""

import ctypes
import hashlib
import importlib.metadata
import importlib.util
import re
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
PROVIDER = "libascendcl.so"
"""Holds all functions; the other libraries depend on it, and dlsym looks through dependencies."""
OTHERS = (
    "libhccl.so",
    "libacl_op_compiler.so",
    "libge_runner.so",
    "libgraph.so",
    "libacl_tdt_channel.so",
    "libopapi.so",
    "libruntime.so",
)
CANN = re.compile(r"acl|Acl|rt[A-Z]|Msprof|Hccl|ge[A-Z]")
ACLNN_HELPERS = [
    f"acl{verb}{kind}"
    for verb in ("Create", "Destroy")
    for kind in ("Tensor", "Scalar", "IntArray", "BoolArray", "FloatArray", "TensorList", "ScalarList")
]


def load() -> None:
    """Load the stub libraries, built first where needed; torch_npu's own libraries then find their names taken."""
    folder = built()
    for name in (PROVIDER, *OTHERS):
        ctypes.CDLL(str(folder / name), mode=ctypes.RTLD_GLOBAL)


def built() -> Path:
    """The folder of the stub libraries for the installed torch_npu. Raises RuntimeError with the compiler's words if they do not build."""
    folder = Path(sys.prefix) / "cann-stubs" / _key()
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        work = Path(scratch) / "new"
        work.mkdir()
        _build(work)
        try:
            work.rename(folder)
        except OSError:  # another process was first
            if not folder.exists():
                raise
    return folder


def _key() -> str:
    sources = b"".join((HERE / name).read_bytes() for name in ("acl.c", "cann_stubs.py"))
    return f"{importlib.metadata.version('torch_npu')}-{hashlib.sha256(sources).hexdigest()[:12]}"


def _build(work: Path) -> None:
    torch_npu = Path(importlib.util.find_spec("torch_npu").submodule_search_locations[0])
    _gcc("-c", "-Wall", "-Wextra", "-Werror", f"-I{torch_npu / 'include'}", str(HERE / "acl.c"), "-o", str(work / "acl.o"))
    carried_out = _symbols(work / "acl.o", defined=True)
    (work / "names.c").write_text(_source(sorted(_missing(torch_npu) - carried_out)))
    _library(work, PROVIDER, "names.c", "acl.o")
    (work / "aclnn.c").write_text(_source(_aclnn(torch_npu)))
    (work / "empty.c").write_text("")
    for name in OTHERS:
        _library(work, name, "aclnn.c" if name == "libopapi.so" else "empty.c", "-Wl,--no-as-needed", f"-L{work}", "-lascendcl")


def _source(names: list[str]) -> str:
    """C functions of these names that take whatever they are given and return 0."""
    return "".join(f"int {name}() {{ return 0; }}\n" for name in names)


def _library(work: Path, name: str, *parts: str) -> None:
    _gcc("-shared", "-w", "-o", name, *parts, f"-Wl,-soname,{name}", folder=work)


def _gcc(*arguments: str, folder: Path | None = None) -> None:
    ran = subprocess.run(["gcc", "-std=gnu11", "-fPIC", "-O1", *arguments], cwd=folder, capture_output=True, text=True)
    if ran.returncode:
        raise RuntimeError(f"gcc {' '.join(arguments)} failed:\n{ran.stderr[-4000:]}")


def _missing(torch_npu: Path) -> set[str]:
    """Names of CANN that torch_npu's libraries are linked against."""
    libraries = [*(torch_npu / "lib").glob("*.so"), *torch_npu.glob("_C*.so")]
    there, needed = (set().union(*(_symbols(path, defined=defined) for path in libraries)) for defined in (True, False))
    return {name for name in needed - there if CANN.match(name)}


def _symbols(path: Path, *, defined: bool) -> set[str]:
    """Dynamic symbols (of an object file: all of them) by name; undefined ones without the versioned names of libc and libstdc++."""
    flags = ["--defined-only" if defined else "--undefined-only", *([] if path.suffix == ".o" else ["-D"])]
    lines = subprocess.run(["nm", *flags, str(path)], capture_output=True, text=True, check=True).stdout.splitlines()
    names = [line.split()[-1] for line in lines if defined or line.split()[-2] == "U"]
    return {name.split("@")[0] for name in names if defined or "@" not in name}


def _aclnn(torch_npu: Path) -> list[str]:
    """Every `aclnn*` name in torch_npu, which looks them up while it runs, with the function that tells its workspace."""
    found = re.findall(rb"\x00(aclnn[A-Z][A-Za-z0-9]+)(?=\x00)", (torch_npu / "lib/libtorch_npu.so").read_bytes())
    names = {name.decode() for name in found}
    return sorted({*names, *(f"{name}GetWorkspaceSize" for name in names if not name.endswith("GetWorkspaceSize")), *ACLNN_HELPERS})
