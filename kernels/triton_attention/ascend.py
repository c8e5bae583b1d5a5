"""Does a tile fit an Ascend chip? Compiled without CANN and without an NPU, by triton-ascend 3.2 and bishengir-compile of ascendnpu-ir.

    python -m llmtrain_kernels.triton_attention.ascend --soc Ascend910B2             # every shipped tile; exit code 1 if one does not fit
    python -m llmtrain_kernels.triton_attention.ascend --soc Ascend910B2 --search    # all candidates, and the largest that fits

A tile fits if bishengir-compile writes the optimised HIVM module: by then it has planned the buffers of the chip (UB, L1, L0). The step
after that needs CANN, so nothing here says that a kernel computes the right thing, or fast. Packages: triton-ascend==3.2.0,
ascendnpu-ir==1.2.0 (both without dependencies, since triton-ascend replaces `triton`), torch, numpy<2, pybind11, attrs, psutil.
"""

import argparse
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from llmtrain_kernels.triton_attention.tiles import KERNELS, Tile, ascend_chip, tile

HEAD_DIMS = ((64, 64), (96, 96), (128, 128), (192, 128), (256, 256))
DTYPES = {"bf16": 2, "fp32": 4}
"""fp16 needs what bf16 needs."""

OPTIMISED = "module.hivm.opt.mlir"
EDGES = (16, 32, 64, 128, 256)
FLAGS = (
    "--enable-auto-multi-buffer=true",
    "--enable-auto-bind-sub-block=true",
    "--enable-hfusion-compile=true",
    "--enable-hivm-compile=true",
    "--enable-triton-kernel-compile=true",
)


def compiler() -> Path:
    """The folder of bishengir-compile. Raises RuntimeError where ascendnpu-ir is not installed."""
    spec = importlib.util.find_spec("ascendnpuir")
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeError("compiling for Ascend needs the package ascendnpu-ir==1.2.0")
    return Path(next(iter(spec.submodule_search_locations))) / "bin"


@cache
def _backend(soc: str) -> tuple[Any, Any]:
    """triton-ascend's module and its backend for a chip."""
    os.environ["PATH"] = f"{compiler()}:{os.environ['PATH']}"
    os.environ["TRITON_ASCEND_ARCH"] = soc
    try:
        import triton.backends.ascend.compiler as ascend
    except ImportError as error:
        raise RuntimeError("compiling for Ascend needs the package triton-ascend==3.2.0 in place of triton") from error
    from triton.backends.compiler import GPUTarget

    return ascend, ascend.AscendBackend(GPUTarget("npu", soc, 0))


def lowered(kernel: str, size: Tile, *, d: int, dv: int, dtype: str = "bf16", soc: str = "Ascend910B2") -> str:
    """The kernel in MLIR of upstream dialects (linalg), as triton-ascend hands it to bishengir-compile."""
    ascend, backend = _backend(soc)
    from llmtrain_kernels.triton_attention.signatures import signature
    from triton._C.libtriton import ir
    from triton.compiler import ASTSource

    shape = signature(kernel, size, d=d, dv=dv, dtype=dtype)
    source = ASTSource(fn=shape.function, signature=shape.types | dict.fromkeys(shape.constants, "constexpr"), constants=shape.constants)
    options, context = backend.parse_options({}), ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    module = source.make_ir(options, backend.get_codegen_implementation(), backend.get_module_map(), context)
    metadata = {**options.__dict__, "target": backend.target}
    module = ascend.make_ttir(module, metadata, options)
    text, _ = ascend._parse_linalg_metadata(ascend.ttir_to_linalg(module, metadata, options, named_ops=True), metadata)
    return text


def misfit(kernel: str, size: Tile, *, d: int, dv: int, dtype: str = "bf16", soc: str = "Ascend910B2") -> str | None:
    """Why a tile does not fit the chip, in the compiler's words, or None if it does."""
    text = lowered(kernel, size, d=d, dv=dv, dtype=dtype, soc=soc)
    with tempfile.TemporaryDirectory() as folder:
        source, kept = Path(folder, "kernel.mlir"), Path(folder, "kept")
        source.write_text(text)
        kept.mkdir()
        command = [compiler() / "bishengir-compile", source, f"--target={soc}", *FLAGS, f"--save-temps={kept}", "-o", Path(folder, "out")]
        run = subprocess.run(command, capture_output=True, text=True)
        if (kept / OPTIMISED).exists():
            return None
    said = run.stdout + run.stderr
    found = re.search(r"\w+ overflow, requires \d+ bits while \d+ bits available", said)
    return found.group(0) if found else f"bishengir-compile ended with {run.returncode}: {said.strip()[:400]}"


def shipped(soc: str) -> Iterator[tuple[str, int, int, str, Tile]]:
    """(kernel, d, dv, dtype, tile) of everything in the tables for this chip."""
    for d, dv in HEAD_DIMS:
        for dtype, itemsize in DTYPES.items():
            for kernel in KERNELS:
                yield kernel, d, dv, dtype, tile(ascend_chip(soc), kernel, d=d, dv=dv, itemsize=itemsize)


def check(soc: str) -> int:
    """Print whether each shipped tile fits; how many do not."""
    misfits = 0
    for kernel, d, dv, dtype, size in shipped(soc):
        reason = misfit(kernel, size, d=d, dv=dv, dtype=dtype, soc=soc)
        misfits += reason is not None
        print(f"{soc} {kernel} {d}/{dv} {dtype} {size.queries}x{size.keys}: {reason or 'fits'}", flush=True)
    return misfits


def search(soc: str, head_dims: tuple[tuple[int, int], ...] = HEAD_DIMS, kernels: tuple[str, ...] = KERNELS[:3]) -> None:
    """Print, for each kernel, head dim and dtype, which candidates fit, the largest first, up to the first two."""
    sizes = sorted(((a, b) for a in EDGES for b in EDGES if max(a, b) <= 4 * min(a, b)), key=lambda size: (-size[0] * size[1], max(size)))
    for d, dv in head_dims:
        for dtype in DTYPES:
            for kernel in kernels:
                fitting: list[str] = []
                for queries, keys in sizes:
                    if len(fitting) < 2 and misfit(kernel, Tile(queries, keys), d=d, dv=dv, dtype=dtype, soc=soc) is None:
                        fitting.append(f"{queries}x{keys}")
                print(f"{soc} {kernel} {d}/{dv} {dtype}: {', '.join(fitting) or 'none'}", flush=True)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--soc", default="Ascend910B2")
    parser.add_argument("--search", action="store_true")
    args = parser.parse_args()
    if args.search:
        search(args.soc)
        return
    sys.exit(1 if check(args.soc) else 0)


if __name__ == "__main__":
    main()
