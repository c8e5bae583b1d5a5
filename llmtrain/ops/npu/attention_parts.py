"""Parts of attention for the ring, by npu_fusion_attention and npu_fusion_attention_grad."""

from torch import Tensor

from llmtrain.ops.attention_shapes import narrow, one_width
from llmtrain.ops.npu import gateway
from llmtrain.ops.npu.attention import check_heads, log_sum_exp, supports_heads
from llmtrain.ops.npu.gateway import DTYPES, NAME, SPEED, needs, reject
from llmtrain.ops.npu.masks import CAUSAL, FULL, Sparse
from llmtrain.ops.registry import register

STATISTICS = 8
"""How often the operator repeats each row's maximum and sum."""


def _kind(q: Tensor, k: Tensor, causal: bool) -> Sparse:
    if causal and q.shape[2] != k.shape[2]:
        raise reject("attention_part", f"causal with {q.shape[2]} queries and {k.shape[2]} keys", "as many keys as queries")
    return CAUSAL if causal else FULL


@register(
    "attention_part", NAME, devices=("npu",), dtypes=DTYPES, speed=SPEED, probe=needs("npu_fusion_attention"), supports=supports_heads
)
def attention_part_npu(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """As `attention_part_reference`; the log-sum-exp comes from the operator's row maxima and sums, in fp32."""
    check_heads("attention_part", q, k, v)
    kind, width = _kind(q, k, causal), v.shape[-1]
    q, k, v = one_width(q, k, v)
    out, top, total, *_ = gateway.fused("npu_fusion_attention")(q, k, v, q.shape[1], "BNSD", scale=scale, **kind.arguments(q.device))
    return narrow(out, width), log_sum_exp(top, total)


@register(
    "attention_part_backward",
    NAME,
    devices=("npu",),
    dtypes=DTYPES,
    speed=SPEED,
    probe=needs("npu_fusion_attention_grad"),
    supports=supports_heads,
)
def attention_part_backward_npu(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """As `attention_part_backward_reference`, but in q's dtype.

    The operator wants each row's maximum and sum of exponentials; with the merged log-sum-exp as the maximum and 1 as the sum its
    probabilities exp(score - maximum) / sum are those of the whole row.
    """
    check_heads("attention_part_backward", q, k, v)
    kind, width, value_width = _kind(q, k, causal), q.shape[-1], v.shape[-1]
    q, k, v = one_width(q, k, v)
    out, grad = (one_width(q, q, x)[2] for x in (out, grad))
    top = lse.float().unsqueeze(-1).expand(*lse.shape, STATISTICS).contiguous()
    grads = gateway.fused("npu_fusion_attention_grad")(
        q,
        k,
        v,
        grad,
        q.shape[1],
        "BNSD",
        softmax_max=top,
        softmax_sum=top.new_ones(top.shape),
        attention_in=out,
        scale_value=scale,
        **kind.arguments(q.device),
    )
    return narrow(grads[0], width), narrow(grads[1], width), narrow(grads[2], value_width)
