"""The attention kernels compiled for a CUDA GPU that is not there, in a process of its own: python compile_cuda.py 90 bf16

Prints a JSON list with one object per shipped tile: matrix instructions, shared memory, and what ptxas says of registers and spills.
"""

import contextlib
import io
import json
import os
import re
import sys

os.environ |= {"TRITON_INTERPRET": "0", "TRITON_ALWAYS_COMPILE": "1", "TRITON_DUMP_PTXAS_LOG": "1"}

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
    options = {"num_warps": size.warps, "num_stages": size.stages, "enable_fp_fusion": True}
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        result = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return {
        "kernel": kernel,
        "d": d,
        "dv": dv,
        "tile": list(size),
        "products": sorted(set(re.findall(r"\b(?:wgmma\.mma_async|mma)\.sync\.aligned\.m\d+n\d+k\d+", result.asm["ptx"]))),
        "shared": result.metadata.shared,
        "registers": number(said.getvalue(), " registers"),
        "spilled": number(said.getvalue(), " bytes spill stores"),
    }


def number(said: str, text: str) -> int:
    """The number before a text of ptxas."""
    return int(re.search(rf"(\d+){text}", said).group(1))


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
