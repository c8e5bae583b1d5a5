"""The tiling mask of FastAttention (arXiv 2410.16663): one small template, and every block's mask a shifted view of it."""

from typing import NamedTuple

import torch
from llmtrain_kernels.tiling import Piece, Tile
from torch import Tensor


def template(edge: int, *, dtype: torch.dtype = torch.bool, device: torch.device | str = "cpu") -> Tensor:
    """[2M,2M] for blocks of at most M = `edge` rows and columns: 1 (hidden) where the column is above the row."""
    return torch.ones(2 * edge, 2 * edge, dtype=dtype, device=device).triu_(1)


class Bytes(NamedTuple):
    """What a causal mask costs."""

    dense: int
    tiled: int


def mask_bytes(length: int, edge: int, *, dtype: torch.dtype = torch.float16) -> Bytes:
    """Bytes of a mask of `length` x `length`, and of the template for blocks up to `edge`."""
    return Bytes(torch.empty(length, length, dtype=dtype, device="meta").nbytes, template(edge, dtype=dtype).nbytes)


class TilingMask:
    """The template on a device, and the mask of a tile made of views of it."""

    def __init__(self, edge: int, device: torch.device | str = "cpu"):
        self.template = template(edge, device=device)

    def hidden(self, tile: Tile) -> Tensor:
        """Booleans [rows, columns] of the tile, True where a query must not see a key.

        A tile inside one document that only the diagonal crosses is a view, nothing is copied. Of others, each document's piece is filled.
        """
        if len(tile.pieces) == 1 and tile.pieces[0].covers(tile) and tile.pieces[0].window is None:
            return self._piece(tile.pieces[0])
        hidden = torch.ones(len(tile.rows), len(tile.columns), dtype=torch.bool, device=self.template.device)
        for piece in tile.pieces:
            rows, columns = piece.within(tile)
            hidden[rows, columns] = self._piece(piece)
        return hidden

    def _piece(self, piece: Piece) -> Tensor:
        hidden = self.template.new_zeros(()) if piece.diagonal is None else self._view(piece.diagonal, piece)
        # The other edge of a window is the same triangle further left, of which the other side is hidden.
        return hidden if piece.window is None else hidden | ~self._view(piece.window, piece)

    def _view(self, corner: tuple[int, int], piece: Piece) -> Tensor:
        row, column = corner
        return self.template[row : row + len(piece.rows), column : column + len(piece.columns)]
