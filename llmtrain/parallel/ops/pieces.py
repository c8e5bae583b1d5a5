"""The order of rows in pieces of a sequence that is shared by ranks.

A rank holds [B,s,F] of [B,S,F], S = t*s, t ranks. It is cut along the sequence in pieces [B,s_i,F]. Collectives put ranks first, so the
rows of all ranks come as pieces one after the other, each of them [t,B,s_i,F]. With one piece and one batch row, that is the sequence
itself, and all of the below are views.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


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
        """[B,s,F] -> [B*s,F], piece after piece; one copy if there are several pieces of several batch rows."""
        return x.flatten(0, 1) if self.batch == 1 else replace(self, ranks=1).whole_rows(x)

    def from_local_rows(self, rows: Tensor) -> Tensor:
        """The inverse of `local_rows`."""
        return rows[None] if self.batch == 1 else replace(self, ranks=1).to_sequence(rows)

    def whole_rows(self, y: Tensor) -> Tensor:
        """[B,S,...] -> [t*B*s,F] in the order of arrival; one copy, none if there is one piece of one contiguous batch row."""
        if len(self.sizes) > 1:
            return _Arrange.apply(y, self).flatten(1)
        return y.unflatten(1, (self.ranks, self.length)).transpose(0, 1).reshape(sum(self.whole_sizes), -1)

    def to_sequence(self, rows: Tensor) -> Tensor:
        """The inverse of `whole_rows`: [t*B*s,F] -> [B,S,F]; one copy, none if there is one piece of one batch row."""
        if len(self.sizes) > 1:
            return _Restore.apply(rows, self)
        parts = rows.view(self.ranks, self.batch, self.length, -1).transpose(0, 1)
        return parts.reshape(self.batch, self.ranks * self.length, -1)

    def arrange(self, y: Tensor) -> Tensor:
        """[B,S,...] -> [t*B*s,...], without gradients."""
        rows = y.new_empty(sum(self.whole_sizes), *y.shape[2:])
        for place, piece in self._places(rows, y):
            place.copy_(piece)
        return rows

    def restore(self, rows: Tensor) -> Tensor:
        """The inverse of `arrange`."""
        y = rows.new_empty(self.batch, self.ranks * self.length, *rows.shape[1:])
        for place, piece in self._places(rows, y):
            piece.copy_(place)
        return y

    def _places(self, rows: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Each piece [t,B,s_i,...] as part of the rows and of the sequence."""
        shared = y.unflatten(1, (self.ranks, self.length)).transpose(0, 1)  # [t,B,s,...]
        for place, piece in zip(rows.split(self.whole_sizes), shared.split(self.sizes, 2)):
            yield place.unflatten(0, piece.shape[:3]), piece


class _Arrange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, pieces: Pieces) -> Tensor:
        ctx.pieces = pieces
        return pieces.arrange(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.pieces.restore(grad), None


class _Restore(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, pieces: Pieces) -> Tensor:
        ctx.pieces = pieces
        return pieces.restore(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.pieces.arrange(grad), None
