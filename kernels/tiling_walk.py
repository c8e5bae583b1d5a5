"""What forward and backward of the tiled attention share: which tiles come, and what a product of small tiles is."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from llmtrain_kernels.tiling import HIDDEN, MIXED, Schedule, Tile, Tiling, blocks, slice_of
from llmtrain_kernels.tiling_counts import Counts
from llmtrain_kernels.tiling_mask import TilingMask
from torch import Tensor


@dataclass
class Large:
    """A large tile that is visited, with the small ones in it that are."""

    tile: Tile
    small: list[Tile]

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return len(self.tile.rows), len(self.tile.columns)

    def place(self, small: Tile) -> tuple[slice, slice]:
        """Rows and columns of a small tile, counted from the large one's."""
        return slice_of(small.rows, self.tile.rows.start), slice_of(small.columns, self.tile.columns.start)


@dataclass
class Walk:
    """The tiles of batch rows with one layout of documents; `times` heads of theirs share each step."""

    schedule: Schedule
    tiling: Tiling
    mask: TilingMask
    counts: Counts
    times: int
    scale: float
    high: torch.dtype

    def row_blocks(self) -> Iterator[range]:
        """Queries, as large tiles have them."""
        return blocks(self.schedule.queries, self.tiling.large[0])

    def column_blocks(self) -> Iterator[range]:
        """Keys, as large tiles have them."""
        return blocks(self.schedule.keys, self.tiling.large[1])

    def large(self, rows: range, columns: range) -> Large | None:
        """A large tile, counted; None if all of it is hidden."""
        tile = self.schedule.tile(rows, columns)
        if tile.kind == HIDDEN:
            self.counts.skip(tile, self.schedule, self.tiling.small, self.times)
            return None
        small = list(self.schedule.tiles(self.tiling.small, rows=rows, columns=columns))
        self.counts.visit(small, self.times)
        return Large(tile, [part for part in small if part.kind != HIDDEN])

    def load(self, x: Tensor, places: range) -> Tensor:
        """Rows of x [..,S,d] from memory to L1, as numbers to compute with."""
        part = x[..., slice_of(places), :]
        self.counts.move("memory > L1", part)
        return part.to(self.high)

    def scores(self, large: Large, left: Tensor, right: Tensor) -> Tensor:
        """Cube: left [..,m,d] by right [..,n,d] -> [..,m,n] in memory, small tile by small tile; minus infinity where none is visited."""
        result = left.new_full((*left.shape[:-2], *large.shape), float("-inf"))
        for small in large.small:
            rows, columns = large.place(small)
            a, b = left[..., rows, :], right[..., columns, :]
            result[..., rows, columns] = a @ b.mT
            self.counts.move("L1 > L0", a, b)
            self.counts.move("L0 > memory", result[..., rows, columns])
        return result

    def hide(self, scores: Tensor, rows: range, columns: range) -> None:
        """Vector: what the mask hides becomes minus infinity, in place; scores [..,rows,columns]."""
        for part in self.schedule.tiles((len(rows), self.tiling.small[1]), rows=rows, columns=columns):
            place = scores[..., slice_of(part.columns, columns.start)]
            if part.kind == HIDDEN:
                place.fill_(float("-inf"))
            elif part.kind == MIXED:
                hidden = self.mask.hidden(part)
                self.counts.move("mask > UB", hidden)
                place.masked_fill_(hidden, float("-inf"))

    def strips(self, large: Large) -> Iterator[tuple[range, slice]]:
        """The rows of a large tile as Vector walks them: as queries, and as rows of the tile."""
        for rows in blocks(large.tile.rows, self.tiling.strip):
            yield rows, slice_of(rows, large.tile.rows.start)
