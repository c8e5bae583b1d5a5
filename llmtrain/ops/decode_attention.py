"""Attention of one new token per row over cached keys, where every row has a length of its own."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from llmtrain.ops.registry import Call, register
from llmtrain.ops.sdpa import sdpa_supports


class KeyLengths:
    """How many keys the query of each row sees: the first `lengths[b]`, the query's own being the last of them.

    Made once per step and shared by all blocks, so that what is derived from it is computed once.
    """

    def __init__(self, lengths: Iterable[int]):
        self.lengths = tuple(lengths)
        self.longest = max(self.lengths)
        self.equal = min(self.lengths) == self.longest
        self._bias: dict[tuple, Tensor] = {}

    def hides(self, window: int | None) -> bool:
        """Whether some query must not see some of the first `longest` keys."""
        return not self.equal or (window is not None and window < self.longest)

    def seen(self, window: int | None, device: torch.device) -> Tensor:
        """Booleans [B,1,1,longest]."""
        end = torch.tensor(self.lengths, device=device)[:, None, None, None]
        key = torch.arange(self.longest, device=device)
        return key < end if window is None else (key < end) & (key >= end - window)

    def bias(self, window: int | None, dtype: torch.dtype, device: torch.device) -> Tensor:
        """0 where a key is seen and minus infinity elsewhere, [B,1,1,longest]."""
        key = (window, dtype, device)
        if key not in self._bias:
            seen = self.seen(window, device)
            self._bias[key] = torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, float("-inf"))
        return self._bias[key]


def check_decode(q: Tensor, k: Tensor, v: Tensor, lengths: KeyLengths) -> None:
    """Raise ValueError unless shapes and lengths fit together."""
    fits = q.shape[2] == 1 and k.shape[:3] == v.shape[:3] and q.shape[1] % k.shape[1] == 0
    if not fits or k.shape[2] != lengths.longest or not len(lengths.lengths) == q.shape[0] == k.shape[0]:
        shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}, {len(lengths.lengths)} lengths up to {lengths.longest}"
        raise ValueError(f"decode_attention: {shapes}; needed q [B,H,1,d], k [B,K,T,d], v [B,K,T,dv], B lengths, the longest T")


@register("decode_attention", "reference", speed=0)
def decode_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, *, lengths: KeyLengths, window: int | None = None, scale: float | None = None
) -> Tensor:
    """Softmax attention of one query per row by the formula, in fp32 (fp64 for fp64).

    q [B,H,1,d], k [B,K,T,d], v [B,K,T,dv] -> [B,H,1,dv] in q's dtype. Row b sees its first `lengths.lengths[b]` keys, with a `window` the
    last that many of them. `scale` is 1/sqrt(d) by default.
    """
    check_decode(q, k, v, lengths)
    high = torch.promote_types(q.dtype, torch.float32)
    repeat = q.shape[1] // k.shape[1]
    key, value = (x.to(high).repeat_interleave(repeat, dim=1) for x in (k, v))
    scores = q.to(high) @ key.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)  # [B,H,1,T]
    scores = scores.masked_fill(~lengths.seen(window, q.device), float("-inf"))
    return (scores.softmax(-1) @ value).to(q.dtype)


def _seen_by_all(k: Tensor, v: Tensor, lengths: KeyLengths, window: int | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The keys and values that some query sees, as far as a slice can say, and what is added to scores to hide the others."""
    if lengths.equal and window is not None:  # the same keys for all rows: those of the window
        k, v = k[:, :, -window:], v[:, :, -window:]
        window = None
    return k, v, lengths.bias(window, k.dtype, k.device) if lengths.hides(window) else None


def _differ(call: Call) -> bool:
    return call.value_head_dim not in (None, call.head_dim)


def _sdpa_supports(call: Call) -> str | None:
    if _differ(call) and call.device == "npu":
        return "wants values as wide as keys on npu"
    return sdpa_supports(call)


@register("decode_attention", "sdpa", speed=1, supports=_sdpa_supports)
def decode_attention_sdpa(
    q: Tensor, k: Tensor, v: Tensor, *, lengths: KeyLengths, window: int | None = None, scale: float | None = None
) -> Tensor:
    """The same through torch's scaled_dot_product_attention. The query heads that share keys stand as queries of one head, so that the
    keys are read once and never repeated."""
    check_decode(q, k, v, lengths)
    heads = q.shape[1]
    k, v, bias = _seen_by_all(k, v, lengths, window)
    q = q.view(q.shape[0], k.shape[1], heads // k.shape[1], q.shape[3])  # [B,K,H/K,d]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
    return out.view(out.shape[0], heads, 1, out.shape[3])


def _products_support(call: Call) -> str | None:
    return None if _differ(call) else "is made for values of another width than keys"


@register("decode_attention", "products", devices=("cpu",), dtypes=(torch.float64, torch.float32), speed=2, supports=_products_support)
def decode_attention_products(
    q: Tensor, k: Tensor, v: Tensor, *, lengths: KeyLengths, window: int | None = None, scale: float | None = None
) -> Tensor:
    """The same by two matrix products, which copy neither keys nor values. On the CPU scaled_dot_product_attention has no kernel for
    values of another width than keys, and multiplies all keys by the root of the scale."""
    check_decode(q, k, v, lengths)
    heads = q.shape[1]
    k, v, bias = _seen_by_all(k, v, lengths, window)
    q = q.view(q.shape[0], k.shape[1], heads // k.shape[1], q.shape[3]) * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = q @ k.transpose(-1, -2)  # [B,K,H/K,T]
    out = (scores if bias is None else scores + bias).softmax(-1) @ v
    return out.view(out.shape[0], heads, 1, out.shape[3])
