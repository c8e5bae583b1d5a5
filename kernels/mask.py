"""Which keys a query sees, described without a tensor."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from typing import TypeVar

Documents = tuple[tuple[int, ...], ...]
Made = TypeVar("Made")


@dataclass(frozen=True)
class Mask:
    """Which keys each query sees; hashable, and never a tensor.

    Query i of a call stands at position `q_offset + i`, key j at `kv_offset + j`. It sees the key if all of these hold:

    - `causal`: the key's position is not above the query's;
    - `documents`: both positions lie in the same document. One tuple of lengths per batch row, covering the positions of the call;
    - `window`: the key is one of the last `window` positions up to and including the query's own. It needs `causal`.

    A query that sees no key gets an output of zeros and a log-sum-exp of minus infinity.
    """

    causal: bool = True
    documents: Documents | None = None
    window: int | None = None

    def once(self, name: Hashable, make: Callable[["Mask"], Made]) -> Made:
        """`make(self)`, made at the first call under this name and kept with this object.

        A micro-batch has one mask for all its layers and pipeline stages: what a back end works out of it need not be made for each.
        """
        kept = self.__dict__.setdefault("_kept", {})
        if name not in kept:
            kept[name] = make(self)
        return kept[name]

    def windowed(self, window: int) -> "Mask":
        """This mask with a window; the same object every time."""
        return self.once(("window", window), lambda mask: replace(mask, window=window))

    def check(self, *, rows: int, end: int) -> None:
        """Raise ValueError unless this mask fits a call of `rows` batch rows whose positions stop before `end`."""
        self.once(("fits", rows, end), lambda mask: mask._check(rows, end))

    def _check(self, rows: int, end: int) -> None:
        if self.window is not None and (self.window < 1 or not self.causal):
            raise ValueError(f"mask.window={self.window}, causal={self.causal}: a window is at least 1 and needs causal=True")
        if self.documents is None:
            return
        if len(self.documents) != rows:
            raise ValueError(f"mask.documents describes {len(self.documents)} batch rows, the call has {rows}")
        for row, lengths in enumerate(self.documents):
            if any(length < 1 for length in lengths) or sum(lengths) != end:
                raise ValueError(
                    f"mask.documents[{row}]={_short(lengths)} sums to {sum(lengths)}; lengths must be at least 1 and sum to {end}"
                )

    def clipped(self, end: int) -> "Mask":
        """This mask for the positions before `end` alone: later documents dropped, the last one cut."""
        if self.documents is None:
            return self
        return Mask(causal=self.causal, documents=tuple(_clip(lengths, end) for lengths in self.documents), window=self.window)


def _clip(lengths: tuple[int, ...], end: int) -> tuple[int, ...]:
    kept, start = [], 0
    for length in lengths:
        if start >= end:
            break
        kept.append(min(length, end - start))
        start += length
    return tuple(kept)


def _short(lengths: tuple[int, ...]) -> str:
    return str(lengths) if len(lengths) <= 8 else f"{str(lengths[:8])[:-1]}, ... {len(lengths)} documents)"
