"""The kernels as a compiler wants them without tensors: types of arguments and constants, for one tile."""

from typing import Any, NamedTuple

from llmtrain_kernels.triton_attention import backward, forward
from llmtrain_kernels.triton_attention.tiles import BACKWARD_KV, BACKWARD_Q, DELTA, FORWARD, Tile, padded

FUNCTIONS = {
    FORWARD: forward.attention_forward,
    BACKWARD_Q: backward.attention_backward_q,
    BACKWARD_KV: backward.attention_backward_kv,
    DELTA: backward.attention_delta,
}
MATRICES = ("q", "k", "v", "out", "grad", "grad_q", "grad_k", "grad_v")
VECTORS = ("lse", "grad_lse", "delta")
PLACES = ("first", "last", "q_first", "q_last")
LOOSE = ("heads", "kv_heads", "queries", "keys", "mask_row")
"""Whole numbers of which nothing is known; the others, strides and the first block of a launch, are multiples of 16 as in real calls."""


class Signature(NamedTuple):
    """A kernel of Triton, its arguments' types, the constants, and the names of the arguments that are multiples of 16."""

    function: Any
    types: dict[str, str]
    constants: dict[str, Any]
    aligned: list[str]


def signature(kernel: str, tile: Tile, *, d: int, dv: int, dtype: str = "bf16", group: int = 4) -> Signature:
    """That of a kernel of `tiles.KERNELS` for one tile; dtype: fp16, bf16 or fp32."""
    function = FUNCTIONS[kernel]
    constants = {"GROUP": group, "D": d, "DV": dv, "D_PAD": padded(d), "DV_PAD": padded(dv), "PRECISION": "ieee", "HAS_GRAD_LSE": True}
    constants |= {"ROWS": tile.queries, "COLUMNS": tile.keys}
    constants = {name: value for name, value in constants.items() if name in function.arg_names}
    types = {name: _type(name, dtype) for name in function.arg_names if name not in constants}
    aligned = [name for name, kind in types.items() if kind[0] == "*" or (kind == "i32" and name not in LOOSE)]
    return Signature(function, types, constants, aligned)


def _type(name: str, dtype: str) -> str:
    if name in MATRICES:
        return f"*{dtype}"
    if name in VECTORS:
        return "*fp32"
    if name in PLACES:
        return "*i32"
    return "fp32" if name == "scale" else "i32"
