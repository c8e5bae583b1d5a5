"""What a run of the tiled attention did: tiles, hand-overs between Cube and Vector, bytes moved."""

from collections import Counter
from dataclasses import dataclass, field

from llmtrain_kernels.tiling import HIDDEN, MIXED, Schedule, Tile
from torch import Tensor


@dataclass
class Counts:
    """Sums over all heads, batch rows and calls that were given this object. `moved`: bytes by "from > to".

    A hand-over is a large tile that Cube gives to Vector under one flag. Without the first level, each small tile would need one:
    `small_visited` is that number.
    """

    large_visited: int = 0
    large_skipped: int = 0
    small_visited: int = 0
    small_skipped: int = 0
    small_masked: int = 0
    hand_overs: int = 0
    moved: Counter[str] = field(default_factory=Counter)

    def skip(self, tile: Tile, schedule: Schedule, block: tuple[int, int], times: int) -> None:
        """A hidden large tile, for `times` heads of all rows."""
        self.large_skipped += times
        self.small_skipped += times * sum(1 for _ in schedule.tiles(block, rows=tile.rows, columns=tile.columns))

    def visit(self, small: list[Tile], times: int) -> None:
        """A large tile and its small ones."""
        kinds = Counter(tile.kind for tile in small)
        self.large_visited += times
        self.hand_overs += times
        self.small_skipped += times * kinds[HIDDEN]
        self.small_masked += times * kinds[MIXED]
        self.small_visited += times * (len(small) - kinds[HIDDEN])

    def move(self, way: str, *tensors: Tensor) -> None:
        """Count what these tensors hold."""
        self.moved[way] += sum(x.numel() * x.element_size() for x in tensors)
