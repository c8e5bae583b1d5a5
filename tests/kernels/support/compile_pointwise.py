"""The kernels of triton_pointwise compiled for a CUDA GPU that is not there, in a process of its own: python compile_pointwise.py 90

Prints a JSON object: kernel -> registers a thread and bytes spilled, by ptxas, in bf16 at the blocks that large shapes take.
"""

import contextlib
import io
import json
import os
import re
import sys

os.environ |= {"TRITON_INTERPRET": "0", "TRITON_ALWAYS_COMPILE": "1", "TRITON_DUMP_PTXAS_LOG": "1"}

import triton
from llmtrain_kernels.triton_pointwise import cross_entropy, experts, programs
from llmtrain_kernels.triton_pointwise.rope import ELEMENTS
from llmtrain_kernels.triton_pointwise.swiglu import BLOCK
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

WIDE = {"scale", "parts", "losses", "probs", "grad_probs", "cos", "sin"}
WHOLE = {"target", "places"}
MATRICES = {"x", "weight", "out", "grad", "grad_x", "gate", "up", "grad_gate", "grad_up", "logits", "rows", "grad_rows"}
CASES = {
    "rms_norm_forward": ({"WIDTH": 8192}, 16),
    "rms_norm_backward": ({"WIDTH": 8192}, 16),
    "rope_turn": ({"BACK": True, "ROWS": ELEMENTS // 128, "HALF": 64}, 4),
    "swiglu_forward": ({"BLOCK": BLOCK}, 4),
    "swiglu_backward": ({"BLOCK": BLOCK}, 4),
    "softmax_losses": ({"SLOPE": True, "BLOCK": cross_entropy.BLOCK}, 8),
    "sum_copies": ({"WEIGHED": True, "BLOCK": experts.BLOCK}, 4),
    "spread_copies": ({"BLOCK": experts.BLOCK}, 4),
}


def kind(name: str, function: str) -> str:
    """The type of an argument; `rows` counts them in two of the kernels."""
    if name in WHOLE:
        return "*i64"
    if name in WIDE:
        return "*fp32"
    if name in MATRICES and not (name == "rows" and function in ("rms_norm_backward", "rope_turn")):
        return "*bf16"
    return "fp32" if name == "eps" else "i32"


def compiled(name: str, capability: int) -> dict[str, int]:
    """What ptxas says of one kernel."""
    constants, warps = CASES[name]
    function = getattr(programs, name)
    types = {arg: "constexpr" if arg in constants else kind(arg, name) for arg in function.arg_names}
    places = {arg: (index,) for index, arg in enumerate(function.arg_names)}
    aligned = {places[arg]: [["tt.divisibility", 16]] for arg in types if types[arg][0] == "*" or arg in ("width", "stride")}
    source = ASTSource(fn=function, signature=types, constexprs={places[a]: v for a, v in constants.items()}, attrs=aligned)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
    return {key: int(re.search(rf"(\d+){text}", said.getvalue()).group(1)) for key, text in TEXTS.items()}


TEXTS = {"registers": " registers", "spilled": " bytes spill stores"}


if __name__ == "__main__":
    print(json.dumps({name: compiled(name, int(sys.argv[1])) for name in CASES}))
