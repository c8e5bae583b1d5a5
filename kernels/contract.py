"""What every attention here takes: `attention(q, k, v, *, mask, scale, q_offset, kv_offset, return_lse)`."""

from llmtrain_kernels.mask import Mask
from torch import Tensor


def check_attention(q: Tensor, k: Tensor, v: Tensor, mask: Mask, *, q_offset: int, kv_offset: int) -> None:
    """Raise ValueError unless shapes, heads and mask of an attention call fit together."""
    if q.shape[0] != k.shape[0] or k.shape[:3] != v.shape[:3] or q.shape[-1] != k.shape[-1] or q.shape[1] % k.shape[1]:
        shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        raise ValueError(f"attention: {shapes}; needed q [B,H,S,d], k [B,K,T,d], v [B,K,T,dv] with H a multiple of K")
    if q_offset < 0 or kv_offset < 0:
        raise ValueError(f"attention: q_offset={q_offset}, kv_offset={kv_offset}; offsets are positions and not negative")
    mask.check(rows=q.shape[0], end=max(q_offset + q.shape[2], kv_offset + k.shape[2]))
