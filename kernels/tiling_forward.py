"""Forward pass of the tiled attention: large tiles, small tiles, online softmax."""

from collections.abc import Iterator

import torch
from llmtrain_kernels.tiling_walk import Large, Walk
from torch import Tensor


class _Softmax:
    """The online softmax of a block of queries: the largest score so far, sums relative to it."""

    def __init__(self, query: Tensor, width: int):
        self.largest = query.new_full((*query.shape[:-1], 1), float("-inf"))
        self.total = torch.zeros_like(self.largest)
        self.values = query.new_zeros(*query.shape[:-1], width)

    def weigh(self, scores: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """Scores of some rows [..,m,n] -> their weights relative to the new largest, and what all before shrinks by [..,m,1]."""
        before = self.largest[..., rows, :]
        largest = torch.maximum(before, scores.amax(-1, keepdim=True))
        finite = largest.masked_fill(largest == float("-inf"), 0.0)  # rows that have seen no key yet
        weights, shrink = torch.exp(scores - finite), torch.exp(before - finite)
        self.largest[..., rows, :] = largest
        self.total[..., rows, :] = self.total[..., rows, :] * shrink + weights.sum(-1, keepdim=True)
        return weights, shrink

    def result(self) -> tuple[Tensor, Tensor]:
        """Output [..,m,dv] and log-sum-exp [..,m]."""
        empty = self.total == 0
        out = self.values / self.total.masked_fill(empty, 1.0)
        lse = self.largest + torch.log(self.total.masked_fill(empty, 1.0))
        return out, lse.squeeze(-1)


def outputs(walk: Walk, q: Tensor, k: Tensor, v: Tensor) -> Iterator[tuple[range, Tensor, Tensor]]:
    """Queries, their output [B,K,G,m,dv] and log-sum-exp [B,K,G,m]; q [B,K,G,S,d], k [B,K,1,T,d], v [B,K,1,T,dv]."""
    for rows in walk.row_blocks():
        query = walk.load(q, rows) * walk.scale
        softmax = _Softmax(query, v.shape[-1])
        for columns in walk.column_blocks():
            large = walk.large(rows, columns)
            if large is not None:
                _take_in(walk, large, softmax, query, walk.load(k, columns), walk.load(v, columns))
        yield rows, *softmax.result()


def _take_in(walk: Walk, large: Large, softmax: _Softmax, query: Tensor, key: Tensor, value: Tensor) -> None:
    """One large tile: Cube, the flag, Vector, Cube."""
    scores = walk.scores(large, query, key)
    weights = torch.empty_like(scores)
    for rows, place in walk.strips(large):
        strip = scores[..., place, :]
        walk.counts.move("memory > UB", strip)
        walk.hide(strip, rows, large.tile.columns)
        weights[..., place, :], shrink = softmax.weigh(strip, place)
        softmax.values[..., place, :] *= shrink
        walk.counts.move("UB > memory", weights[..., place, :])
    for small in large.small:
        place, columns = large.place(small)
        walk.counts.move("L1 > L0", weights[..., place, columns], value[..., columns, :])
        softmax.values[..., place, :] += weights[..., place, columns] @ value[..., columns, :]
