"""FastAttention by its specification in plain PyTorch, as an entry of the registry."""

from llmtrain_kernels import tiling_attention
from llmtrain_kernels.mask import Mask
from torch import Tensor

from llmtrain.ops.registry import register


@register("attention", "fast_reference", speed=-2)
def attention_fast_reference(
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
    """Shapes as in `attention_reference`: FastAttention's two levels of tiles in plain PyTorch, the specification of its kernels.

    Slow, so never chosen by `auto`; for memory that does not grow with S x T where nothing faster serves, and for comparing.
    """
    return tiling_attention.attention(q, k, v, mask=mask, scale=scale, q_offset=q_offset, kv_offset=kv_offset, return_lse=return_lse)
