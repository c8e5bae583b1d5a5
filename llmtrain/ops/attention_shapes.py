"""How kernels with one head dim, or with all documents in a row, are given what attention takes."""

import torch.nn.functional as F
from llmtrain_kernels.mask import Mask
from torch import Tensor


def one_width(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pad the narrower of (q, k) and v with zeros, which change nothing."""
    wide = max(q.shape[-1], v.shape[-1])
    q, k, v = (x if x.shape[-1] == wide else F.pad(x, (0, wide - x.shape[-1])) for x in (q, k, v))
    return q, k, v


def narrow(x: Tensor, width: int) -> Tensor:
    """The first `width` of the last dim."""
    return x if x.shape[-1] == width else x[..., :width]


def packed_lengths(mask: Mask) -> list[int] | None:
    """Lengths of all documents of all rows, or None if every row is one; worked out once per mask."""
    return mask.once("packed lengths", _lengths)


def _lengths(mask: Mask) -> list[int] | None:
    if mask.documents is None or all(len(row) == 1 for row in mask.documents):
        return None
    return [length for row in mask.documents for length in row]


def last_key_is_last_query(mask: Mask, *, queries: int, keys: int, q_offset: int, kv_offset: int) -> bool:
    """Whether kernels that align a causal mask at the lower right corner, and know no offsets, compute this call, each query seeing a key.

    Packed documents need as many keys as queries, at the same places.
    """
    if packed_lengths(mask) is not None:
        return queries == keys and q_offset == kv_offset == 0
    return not mask.causal or (keys >= queries and q_offset + queries == kv_offset + keys)
