"""In which order samples are taken from several sources, so that every beginning of the run has the wanted mix."""

from fractions import Fraction
from heapq import heappop, heappush
from math import gcd, lcm
from pathlib import Path

import numpy as np

from llmtrain.data.cache import cached_arrays, content_key

WHOLE_PERIOD = 1 << 20
"""A mix whose order repeats after at most this many samples is stored as one period."""


def whole_shares(weights: list[float]) -> list[int]:
    """The smallest integers in the proportion of the weights, each taken as the decimal number that it is written as."""
    parts = [Fraction(repr(float(w))) for w in weights]
    scale = lcm(*(p.denominator for p in parts))
    whole = [int(p * scale) for p in parts]
    return [w // gcd(*whole) for w in whole]


def blend_order(shares: list[int], length: int) -> np.ndarray:
    """The source of each of the first `length` samples, uint16; in every prefix each source is within one sample of its share.

    Sample j (from 0) of a source with share w of the total W may come at the earliest at place floor(j W / w) and must have come by
    place ceil((j + 1) W / w) - 1. Of those that may come, the one that must come first is taken, which meets every date
    (Steiner and Yeomans 1993, Level schedules for mixed-model, just-in-time processes); ties go to the source named first.
    """
    total = sum(shares)
    order = np.empty(length, np.uint16)
    taken = [0] * len(shares)
    ready: list[tuple[int, int]] = []  # (last place, source)
    waiting = [(0, k) for k, share in enumerate(shares) if share]  # (first place, source)
    for place in range(length):
        while waiting and waiting[0][0] <= place:
            _, k = heappop(waiting)
            heappush(ready, (-(-(taken[k] + 1) * total // shares[k]) - 1, k))
        _, k = heappop(ready)
        order[place] = k
        taken[k] += 1
        heappush(waiting, (taken[k] * total // shares[k], k))
    return order


def count_before(order: np.ndarray, sources: int) -> np.ndarray:
    """For each place, how many earlier ones have the same source: int64, as long as `order`."""
    before = np.empty(len(order), np.int64)
    for k in range(sources):
        places = np.flatnonzero(order == k)
        before[places] = np.arange(len(places))
    return before


class Blend:
    """Place -> (source, sample of that source), for places below `samples`; does not depend on `samples`.

    Args:
        weights: one per source, not negative, not all 0.
        samples: how far the order must reach.
        cache: folder of the index; a blend of one source needs none.
    """

    def __init__(self, weights: list[float], *, samples: int, cache: Path) -> None:
        self.shares = whole_shares(weights)
        self._only = self.shares.index(1) if sum(self.shares) == 1 else None
        if self._only is not None:
            return
        period = sum(self.shares)
        length = period if period <= WHOLE_PERIOD else min(period, samples)
        folder = cache / f"blend-{content_key(format=1, shares=self.shares, length=length)}"
        self._index = cached_arrays(folder, lambda: self._build(length))

    def _build(self, length: int) -> dict[str, np.ndarray]:
        order = blend_order(self.shares, length)
        return {"source": order, "before": count_before(order, len(self.shares))}

    def __getitem__(self, place: int) -> tuple[int, int]:
        if self._only is not None:
            return self._only, place
        periods, place = divmod(place, len(self._index["source"]))
        source = int(self._index["source"][place])
        return source, periods * self.shares[source] + int(self._index["before"][place])

    def counts(self, samples: int) -> list[int]:
        """How many of the first `samples` places each source has."""
        if self._only is not None:
            return [samples * share for share in self.shares]
        length = len(self._index["source"])
        periods, rest = divmod(samples, length) if samples > length else (0, samples)
        counted = np.bincount(self._index["source"][:rest], minlength=len(self.shares))
        return [periods * share + int(c) for share, c in zip(self.shares, counted)]
