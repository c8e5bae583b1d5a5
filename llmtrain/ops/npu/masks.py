"""Masks as npu_fusion_attention takes them: a mode, two distances, and one small triangle whatever the sequence length is."""

from functools import cache
from typing import Any, NamedTuple

import torch
from llmtrain_kernels.mask import Mask
from torch import Tensor

FAR = 2147483647
"""The operator's own default for both distances: no limit."""

SIDE = 2048
"""Size of the triangle that modes 2, 3 and 4 take in the place of an S x T mask."""


class Sparse(NamedTuple):
    """What a mask is for the operator. `behind` and `ahead` count keys from the query's own, aligned at the last query and key."""

    mode: int
    behind: int = FAR
    ahead: int = FAR

    def arguments(self, device: torch.device) -> dict[str, Any]:
        """Keyword arguments of npu_fusion_attention and its gradient.

        Without atten_mask the operator ignores mode and distances and attends to everything, silently: so the triangle goes along always,
        and full attention is asked for by mode 0 without one.
        """
        if self.mode == FULL.mode:
            return {"sparse_mode": 0}
        distances = {"pre_tockens": self.behind, "next_tockens": self.ahead} if self.mode == BAND else {}
        return {"atten_mask": triangle(device), "sparse_mode": self.mode, **distances}


FULL = Sparse(0)
CAUSAL = Sparse(3)
"""Lower right triangle: the last query sees the last key."""

BAND = 4


@cache
def triangle(device: torch.device) -> Tensor:
    """[2048,2048] booleans, True where a key is hidden (above the diagonal); made once per device, 4 MiB."""
    with torch.inference_mode(False):  # a tensor made in inference mode could not be saved for a backward pass later
        return torch.ones(SIDE, SIDE, dtype=torch.bool, device=device).triu_(1)


def sparse(mask: Mask, *, queries: int, keys: int, shift: int) -> Sparse | None:
    """The mask of `queries` consecutive positions over `keys` ones, the first query standing `shift` places after the first key.

    None if some query sees no key: what the operator returns for such a row is not documented. Documents are the caller's business.
    """
    if not mask.causal:
        return FULL
    window = mask.window if mask.window is not None and mask.window < queries + shift else None
    last_start = 0 if window is None else queries + shift - window  # first key that the last query sees
    if shift < 0 or last_start >= keys:
        return None
    if window is None and shift >= keys - 1:
        return FULL  # the first query sees every key already: decoding one token is this case
    ahead = shift - (keys - queries)
    if window is None and ahead == 0:
        return CAUSAL
    return Sparse(BAND, FAR if window is None else window - 1 - ahead, ahead)
