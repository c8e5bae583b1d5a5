"""A call of attention, as data."""

from dataclasses import dataclass
from typing import Any

from llmtrain_kernels.mask import Mask


@dataclass(frozen=True)
class AttentionCall:
    """One call; `strided`: the tensors are views of [B,S,H,d], as in a model."""

    mask: Mask
    rows: int = 1
    heads: int = 1
    kv_heads: int = 1
    queries: int = 16
    keys: int = 16
    d: int = 64
    dv: int = 64
    q_offset: int = 0
    kv_offset: int = 0
    scale: float | None = None
    lse: bool = False
    strided: bool = False
    seed: int = 0

    @property
    def query_range(self) -> range:
        """Positions of the queries."""
        return range(self.q_offset, self.q_offset + self.queries)

    @property
    def key_range(self) -> range:
        """Positions of the keys."""
        return range(self.kv_offset, self.kv_offset + self.keys)

    def options(self) -> dict[str, Any]:
        """What attention is given beside tensors and `return_lse`."""
        return {"mask": self.mask, "scale": self.scale, "q_offset": self.q_offset, "kv_offset": self.kv_offset}
