"""Attention on Volta by the kernels of llmtrain_kernels.volta. Not run on hardware: see kernels/volta/README.md."""

import os

import torch
from llmtrain_kernels.contract import check_attention
from llmtrain_kernels.mask import Mask
from torch import Tensor

from llmtrain.ops.registry import Call, register

VOLTA = (7, 0)
LARGEST_HEAD = 128
SWITCH = "LLMTRAIN_VOLTA_CHECK"


def _supports(call: Call) -> str | None:
    if call.capability is not None and call.capability != VOLTA:
        return f"is for compute capability 7.0, not {call.capability[0]}.{call.capability[1]}; fast_volta_check runs it there"
    return _supports_call(call)


def _supports_call(call: Call) -> str | None:
    widest = max(call.head_dim or 0, call.value_head_dim or 0)
    return f"takes head dims up to {LARGEST_HEAD}, not {widest}" if widest > LARGEST_HEAD else None


def _probe() -> str | None:
    from llmtrain_kernels.volta.nvrtc import OLDEST, nvrtc

    found = nvrtc()
    if found is None or OLDEST not in found.architectures:
        return 'needs NVRTC 12 to compile for sm_70: pip install "nvidia-cuda-nvrtc-cu12==12.9.*"'
    return None


def _probe_check() -> str | None:
    return None if os.environ.get(SWITCH) else f"is only for checking the Volta kernels: set {SWITCH}=1"


# Below the reference, so that `auto` does not take it before a V100 has run it. Above sdpa (1) is where it would belong if it turns out
# right and faster: the flash kernels of PyTorch begin with capability 8.0, and packed documents are one call here.
@register("attention", "fast_volta", devices=("cuda",), dtypes=(torch.float16,), speed=-0.5, probe=_probe, supports=_supports)
# The same kernels where they are no use but for a check: on a CPU in the host shim, on newer GPUs far from their speed.
@register(
    "attention",
    "fast_volta_check",
    devices=("cpu", "cuda"),
    dtypes=(torch.float16,),
    speed=-1,
    probe=_probe_check,
    supports=_supports_call,
)
def attention_volta(
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
    """Shapes as in `attention_reference`, in fp16, head dims up to 128; the log-sum-exp has a gradient. See `volta_attention`."""
    from llmtrain_kernels.volta import volta_attention

    check_attention(q, k, v, mask, q_offset=q_offset, kv_offset=kv_offset)
    options = {"scale": scale, "q_offset": q_offset, "kv_offset": kv_offset, "return_lse": return_lse}
    return volta_attention(q, k, v, mask=mask, **options)
