"""Backward pass of the tiled attention: weights recomputed from the log-sum-exp, tile by tile."""

import torch
from llmtrain_kernels.tiling_walk import Large, Walk
from torch import Tensor


def gradients(walk: Walk, q: Tensor, k: Tensor, v: Tensor, grad: Tensor, lse: Tensor, delta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q [B,K,G,S,d], k [B,K,1,T,d] and v [B,K,1,T,dv] for that of the output, `grad` [B,K,G,S,dv]; lse, delta [B,K,G,S,1]."""
    grads = grad_q, grad_k, grad_v = [torch.zeros(x.shape, dtype=walk.high, device=x.device) for x in (q, k, v)]
    lse = lse.masked_fill(lse == float("-inf"), float("inf"))  # queries that see no key weigh nothing
    for columns in walk.column_blocks():
        key, value = walk.load(k, columns), walk.load(v, columns)
        for rows in walk.row_blocks():
            large = walk.large(rows, columns)
            if large is None:
                continue
            query, above = walk.load(q, rows) * walk.scale, walk.load(grad, rows)
            place, others = slice(rows.start, rows.stop), slice(columns.start, columns.stop)
            weights, slopes = _weights_and_slopes(walk, large, (query, key), (above, value), (lse[..., place, :], delta[..., place, :]))
            parts = (x[..., where, :] for x, where in zip(grads, (place, others, others)))
            _accumulate(walk, large, weights, slopes, (query, key, above), tuple(parts))
    grad_q *= walk.scale
    return grad_q, grad_k, grad_v


def _weights_and_slopes(
    walk: Walk, large: Large, qk: tuple[Tensor, Tensor], gv: tuple[Tensor, Tensor], rows: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Two products by Cube, the flag, and from them by Vector: the weights of a large tile, and the gradients of its scores."""
    scores, slopes = walk.scores(large, *qk), walk.scores(large, *gv)
    lse, delta = rows
    for queries, place in walk.strips(large):
        strip, slope = scores[..., place, :], slopes[..., place, :]
        walk.counts.move("memory > UB", strip, slope)
        walk.hide(strip, queries, large.tile.columns)
        strip.sub_(lse[..., place, :]).exp_()
        # Where no small tile was visited the slope is infinite and the weight 0.
        slope.sub_(delta[..., place, :]).mul_(strip).masked_fill_(strip == 0, 0.0)
        walk.counts.move("UB > memory", strip, slope)
    return scores, slopes


def _accumulate(
    walk: Walk, large: Large, weights: Tensor, slopes: Tensor, loaded: tuple[Tensor, Tensor, Tensor], parts: tuple[Tensor, Tensor, Tensor]
) -> None:
    """Cube: the products of each small tile, added to these rows of the gradients. Heads that share keys add up."""
    query, key, above = loaded
    grad_q, grad_k, grad_v = parts
    for small in large.small:
        rows, columns = large.place(small)
        weight, slope = weights[..., rows, columns], slopes[..., rows, columns]
        walk.counts.move("L1 > L0", weight, slope, query[..., rows, :], key[..., columns, :], above[..., rows, :])
        grad_q[..., rows, :] += slope @ key[..., columns, :]
        grad_k[..., columns, :] += (slope.mT @ query[..., rows, :]).sum(2, keepdim=True)
        grad_v[..., columns, :] += (weight.mT @ above[..., rows, :]).sum(2, keepdim=True)
