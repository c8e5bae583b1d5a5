"""The attention kernels compiled for a CUDA GPU that is not there, in a process of its own: python compile_cuda.py 90 bf16

Prints a JSON list with one object per shipped tile: matrix instructions, shared memory, and what ptxas says of registers and spills.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from llmtrain_kernels.triton_attention.signatures import signature
from llmtrain_kernels.triton_attention.tiles import KERNELS, Tile, tile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

HEAD_DIMS = ((64, 64), (128, 128), (192, 128))


def compiled(kernel: str, size: Tile, *, d: int, dv: int, dtype: str, capability: int) -> dict:
    """What came out for one tile."""
    shape = signature(kernel, size, d=d, dv=dv, dtype=dtype)
    places = {name: (index,) for index, name in enumerate(shape.function.arg_names)}
    source = ASTSource(
        fn=shape.function,
        signature={name: shape.types.get(name, "constexpr") for name in shape.function.arg_names},
        constexprs={places[name]: value for name, value in shape.constants.items()},
        attrs={places[name]: [["tt.divisibility", 16]] for name in shape.aligned},
    )
    options = {"num_warps": size.warps, "num_stages": size.stages}
    result = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    ptx = result.asm["ptx"]
    return {
        "kernel": kernel,
        "d": d,
        "dv": dv,
        "tile": list(size),
        "products": sorted(set(re.findall(r"\b(?:wgmma\.mma_async|mma)\.sync\.aligned\.m\d+n\d+k\d+", ptx))),
        "shared": result.metadata.shared,
        **assembled(ptx, capability),
    }


def assembled(ptx: str, capability: int) -> dict[str, int]:
    """Registers a thread and bytes spilled, as the ptxas in Triton's wheel says."""
    program = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    architecture = f"sm_{capability}{'a' if capability >= 90 else ''}"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        command = [program, "-v", f"--gpu-name={architecture}", source, "-o", Path(folder, "kernel.cubin")]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    numbers = {name: re.search(rf"(\d+){text}", said) for name, text in (("registers", " registers"), ("spilled", " bytes spill stores"))}
    return {name: int(found.group(1)) for name, found in numbers.items()}


def main() -> None:
    """Every shipped tile of 16 bits for one capability."""
    capability, dtype = int(sys.argv[1]), sys.argv[2]
    results = []
    for d, dv in HEAD_DIMS:
        for kernel in KERNELS[:3]:
            size = tile(f"sm_{capability}", kernel, d=d, dv=dv, itemsize=4 if dtype == "fp32" else 2)
            results.append(compiled(kernel, size, d=d, dv=dv, dtype=dtype, capability=capability))
    print(json.dumps(results))


if __name__ == "__main__":
    main()
