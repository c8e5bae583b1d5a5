"""The order of rows in pieces of a sequence that is shared by ranks.

A rank holds [B,s,F] of [B,S,F], S = t*s, t ranks. It is cut along the sequence in pieces [B,s_i,F]. Collectives put ranks first, so the
rows of all ranks come as pieces one after the other, each of them [t,B,s_i,F]. With one piece and one batch row, that is the sequence
itself, and all of the below are views.
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pieces:
    """B batch rows of s local positions, on each of t ranks, in at most `chunks` pieces."""

    batch: int
    length: int
    ranks: int
    chunks: int

    @cached_property
    def sizes(self) -> list[int]:
        """Positions of each piece; they differ by at most one, and none is empty."""
        count = max(1, min(self.chunks, self.length))
        cuts = [self.length * i // count for i in range(count + 1)]
        return [b - a for a, b in pairwise(cuts)]

    @cached_property
    def local_sizes(self) -> list[int]:
        """Rows of each piece on one rank."""
        return [self.batch * size for size in self.sizes]

    @cached_property
    def whole_sizes(self) -> list[int]:
        """Rows of each piece on all ranks together."""
        return [self.ranks * size for size in self.local_sizes]

    def local_rows(self, x: Tensor) -> Tensor:
        """[B,s,F] -> [B*s,F], piece after piece; a copy if there are several pieces of several batch rows."""
        if self.batch == 1 or len(self.sizes) == 1:
            return x.flatten(0, 1)
        return torch.cat([piece.flatten(0, 1) for piece in x.split(self.sizes, 1)])

    def from_local_rows(self, rows: Tensor) -> Tensor:
        """The inverse of `local_rows`."""
        if self.batch == 1 or len(self.sizes) == 1:
            return rows.view(self.batch, self.length, -1)
        pieces = zip(rows.split(self.local_sizes), self.sizes)
        return torch.cat([piece.view(self.batch, size, -1) for piece, size in pieces], 1)

    def whole_rows(self, y: Tensor) -> Tensor:
        """[B,S,...] -> [t*B*s,F] in the order of arrival; one copy, none if there is one piece of one contiguous batch row."""
        y = y.unflatten(1, (self.ranks, self.length)).transpose(0, 1)  # [t,B,s,...]
        pieces = [piece.reshape(rows, -1) for piece, rows in zip(y.split(self.sizes, 2), self.whole_sizes)]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def to_sequence(self, rows: Tensor) -> Tensor:
        """The inverse of `whole_rows`: [t*B*s,F] -> [B,S,F]; one copy, none if there is one piece of one batch row."""
        pieces = zip(rows.split(self.whole_sizes), self.sizes)
        parts = [piece.view(self.ranks, self.batch, size, -1).transpose(0, 1) for piece, size in pieces]  # [B,t,s_i,F]
        whole = parts[0] if len(parts) == 1 else torch.cat(parts, 2)
        return whole.reshape(self.batch, self.ranks * self.length, -1)
