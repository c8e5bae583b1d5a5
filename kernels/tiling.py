"""Which tiles of an attention's scores are computed, and what of the tiling mask lies on each. Arithmetic, without torch.

The specification of FastAttention's kernels (arXiv 2410.16663) as far as skipping and masking go; docs/kernels.md explains it.
"""

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import NamedTuple

from llmtrain_kernels.mask import Mask

HIDDEN, MIXED, VISIBLE = "hidden", "mixed", "visible"
"""Kinds of a tile: skipped, masked, computed without a mask."""


class View(NamedTuple):
    """The upper left corner of a block's mask in the template."""

    row: int
    column: int


def view(distance: int, rows: int, columns: int) -> View | str:
    """The mask of a block whose first row stands `distance` after its first column: a view of the template, or HIDDEN, or VISIBLE.

    With M at least `rows` and `columns`, the view lies inside the template of 2M x 2M.
    """
    if distance <= -rows:
        return HIDDEN
    if distance >= columns - 1:
        return VISIBLE
    return View(distance, 0) if distance >= 0 else View(0, -distance)


class Piece(NamedTuple):
    """The part of a tile that lies in one document; rows and columns count the queries and keys of the call.

    Hidden is where the view `diagonal` of the template is 1, and where the view `window` is 0; None hides nothing.
    """

    rows: range
    columns: range
    diagonal: View | None
    window: View | None

    def covers(self, tile: "Tile") -> bool:
        """Whether it is all of the tile."""
        return self.rows == tile.rows and self.columns == tile.columns

    def within(self, tile: "Tile") -> tuple[slice, slice]:
        """Its place in the tile."""
        return slice_of(self.rows, tile.rows.start), slice_of(self.columns, tile.columns.start)


class Tile(NamedTuple):
    """Queries `rows` by keys `columns` of the call. What no piece covers is hidden."""

    rows: range
    columns: range
    pieces: tuple[Piece, ...]

    @property
    def kind(self) -> str:
        """HIDDEN, MIXED or VISIBLE; a tile is HIDDEN only if no query of it sees any key of it, and VISIBLE if all see all."""
        if not self.pieces:
            return HIDDEN
        piece = self.pieces[0]
        return VISIBLE if piece.covers(self) and piece.diagonal is None and piece.window is None else MIXED


def slice_of(places: range, start: int = 0) -> slice:
    """A range as a slice of what begins at `start`."""
    return slice(places.start - start, places.stop - start)


def blocks(places: range, size: int) -> Iterator[range]:
    """Consecutive ranges of at most `size`."""
    for first in range(places.start, places.stop, size):
        yield range(first, min(first + size, places.stop))


class Schedule:
    """The tiles of one batch row of a call: `queries` by `keys`, standing at the offsets.

        for tile in Schedule(Mask(), queries=300, keys=300).tiles((128, 64)):
            tile.kind, tile.rows, tile.columns

    `batch_row` says whose documents count.
    """

    def __init__(self, mask: Mask, *, queries: int, keys: int, q_offset: int = 0, kv_offset: int = 0, batch_row: int = 0):
        self.mask, self.queries, self.keys = mask, range(queries), range(keys)
        self.q_offset, self.kv_offset = q_offset, kv_offset
        end = max(q_offset + queries, kv_offset + keys)
        lengths = (end,) if mask.documents is None else mask.documents[batch_row]
        self.borders = [0, *accumulate(lengths)]

    def tiles(self, block: tuple[int, int], *, rows: range | None = None, columns: range | None = None) -> Iterator[Tile]:
        """Tiles of at most `block` (rows, columns) of a part of the call, row by row, hidden ones too."""
        for some in blocks(self.queries if rows is None else rows, block[0]):
            for others in blocks(self.keys if columns is None else columns, block[1]):
                yield self.tile(some, others)

    def tile(self, rows: range, columns: range) -> Tile:
        """These queries by these keys."""
        places, others = _shift(rows, self.q_offset), _shift(columns, self.kv_offset)
        pieces = (self._piece(_meet(places, document), _meet(others, document)) for document in self._documents(places))
        return Tile(rows, columns, tuple(piece for piece in pieces if piece is not None))

    def _documents(self, places: range) -> Iterator[range]:
        first = bisect_right(self.borders, places.start) - 1
        for start, stop in pairwise(self.borders[first:]):
            if start >= places.stop:
                return
            yield range(start, stop)

    def _piece(self, rows: range, columns: range) -> Piece | None:
        """Positions of queries and keys in one document, unless all of them is hidden."""
        if not rows or not columns:
            return None
        distance, diagonal, window = rows.start - columns.start, VISIBLE, HIDDEN
        if self.mask.causal:
            diagonal = view(distance, len(rows), len(columns))
        if self.mask.window is not None:
            window = view(distance - self.mask.window, len(rows), len(columns))
        if diagonal == HIDDEN or window == VISIBLE:
            return None
        places = _shift(rows, -self.q_offset), _shift(columns, -self.kv_offset)
        return Piece(*places, None if diagonal == VISIBLE else diagonal, None if window == HIDDEN else window)


def _shift(places: range, by: int) -> range:
    return range(places.start + by, places.stop + by)


def _meet(places: range, others: range) -> range:
    return range(max(places.start, others.start), min(places.stop, others.stop))


@dataclass(frozen=True)
class Tiling:
    """Edges of tiles (queries, keys) on the two levels, and the rows that a Vector core takes at a time.

    `depth`: the head dims that one step of a matrix product takes.
    """

    large: tuple[int, int] = (256, 256)
    small: tuple[int, int] = (128, 128)
    strip: int = 64
    depth: int = 128

    def __post_init__(self):
        if min(*self.small, self.strip, self.depth) < 1 or any(a > b for a, b in zip(self.small, self.large)):
            raise ValueError(f"{self}: edges are at least 1, and small tiles not larger than large ones")

    @property
    def edge(self) -> int:
        """M of the tiling mask: the largest edge of a tile."""
        return max(self.large)

    def buffers(self, *, d: int, dv: int, itemsize: int = 2) -> dict[str, int]:
        """Bytes that a tiling needs in each buffer of an Ascend core, with two copies of what is loaded while computing.

        L1 holds a block of queries, keys and values; L0A and L0B the operands of a step, L0C its sums in fp32; UB a strip of scores in
        fp32 and of weights, with maximum, sum and factor per row.
        """
        (queries, keys), (rows, columns) = self.large, self.small
        depth = min(self.depth, max(d, dv))
        return {
            "L1": 2 * (queries * d + keys * (d + dv)) * itemsize,
            "L0A": 2 * rows * depth * itemsize,
            "L0B": 2 * depth * columns * itemsize,
            "L0C": 2 * rows * columns * 4,
            "UB": self.strip * (keys * (4 + itemsize) + 3 * 4),
        }


ASCEND_910B = {"L1": 512 << 10, "L0A": 64 << 10, "L0B": 64 << 10, "L0C": 128 << 10, "UB": 192 << 10}
"""Bytes of the buffers of one Cube core (L1, L0) and one Vector core (UB) of an Ascend 910B."""
