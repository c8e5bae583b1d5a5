"""Attention by the flash kernel in Triton of `llmtrain_kernels`: CUDA from sm_80 on, Ascend, and Triton's interpreter on the CPU."""

import torch
from llmtrain_kernels import triton_attention
from llmtrain_kernels.mask import Mask
from llmtrain_kernels.triton_attention import available, tiles
from torch import Tensor

from llmtrain.ops.registry import Call, register

UNMEASURED = -1
"""Below the reference, so that `auto` does not take it: it has been measured as faster than SDPA on no device, and run on no NPU at all.

`bench/attention.py` measures it on a GPU. On the CPU it is interpreted and never fast.
"""


def _supports(call: Call) -> str | None:
    if call.device == "cuda" and call.capability is not None and call.capability < (8, 0):
        return f"needs compute capability 8.0, not {call.capability[0]}.{call.capability[1]}; fast_volta serves 7.0"
    widest = max(call.head_dim or 0, call.value_head_dim or 0)
    if widest > triton_attention.WIDEST:
        return f"takes head dims up to {triton_attention.WIDEST}, not {widest}"
    return triton_attention.unavailable(call.device) or (_no_tiles() if call.device == "npu" else None)


def _no_tiles() -> str | None:
    name = available.chip("npu")
    return None if name in tiles.NARROW else f"has no tiles for {name}"


@register("attention", "fast", dtypes=(torch.float32, torch.bfloat16, torch.float16), speed=UNMEASURED, supports=_supports)
def attention_fast(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask,
    scale: float | None = None,
    q_offset: int = 0,
    kv_offset: int = 0,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Shapes as in `attention_reference`; every mask, offsets and the log-sum-exp with gradients. On an NPU it has not been run."""
    return triton_attention.attention(q, k, v, mask=mask, scale=scale, q_offset=q_offset, kv_offset=kv_offset, return_lse=return_lse)
