"""Ring attention: keys and values travel from rank to rank, each block in flight while the one before it is computed.

Outputs of the blocks are merged through their log-sum-exps. Backward sends keys and values round again, and their gradients after them.
Which queries see which keys of a block is the Partition's `pieces`. Source: ring attention (arXiv 2310.01889) over chunks paired as in
`layout/sequence.py`.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from llmtrain.layout.sequence import Partition, Piece
from llmtrain.ops import Ops
from llmtrain.parallel.hang.where import Begun, count


class _Passing:
    """A tensor on its way to the next rank of the ring, while another one comes from the rank before."""

    def __init__(self, sent: Tensor, group: dist.ProcessGroup):
        rank, ranks = dist.get_rank(group), dist.get_world_size(group)
        after, before = (dist.get_global_rank(group, (rank + step) % ranks) for step in (1, -1))
        self.sent, self.received = sent, torch.empty_like(sent)  # `sent` may not be freed before it is out
        count("send", group, peer=after)
        begun = Begun("recv", group, peer=before)
        to, source = dist.P2POp(dist.isend, sent, after, group), dist.P2POp(dist.irecv, self.received, before, group)
        self.begun = begun.by(*dist.batch_isend_irecv([to, source]))

    def wait(self) -> Tensor:
        self.begun.wait()
        return self.received


def _rotate(block: Tensor, group: dist.ProcessGroup) -> Iterator[Tensor]:
    """`block` of this rank, then of the rank before it, and so on round the ring; the next is under way while one is used."""
    for _ in range(dist.get_world_size(group) - 1):
        passing = _Passing(block, group)
        yield block
        block = passing.wait()
    yield block


def _merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Add one part's output [B,H,m,dv] and log-sum-exp [B,H,m] to those of the parts before it, in place."""
    total = torch.logaddexp(lse, part_lse)
    out.mul_(torch.exp(lse - total).unsqueeze(-1)).add_(part * torch.exp(part_lse - total).unsqueeze(-1))
    lse.copy_(total)


def _views(piece: Piece, q: Tensor, block: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of a piece: views of q [B,H,L,d] and of a block [B,K,L,d+dv]."""
    keys = block[piece.rows, :, piece.keys]
    return q[piece.rows, :, piece.queries], keys[..., : q.shape[-1]], keys[..., q.shape[-1] :]


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, partition: Partition, group: dist.ProcessGroup, ops: Ops, scale: float
    ) -> Tensor:
        high, rank = torch.promote_types(q.dtype, torch.float32), dist.get_rank(group)
        block = torch.cat([k, v], dim=-1).contiguous()  # [B,K,L,d+dv]
        out = q.new_zeros(*q.shape[:3], v.shape[3], dtype=high)
        lse = q.new_full(q.shape[:3], float("-inf"), dtype=high)
        for step, there in enumerate(_rotate(block, group)):
            for piece in partition.pieces(rank, (rank - step) % partition.cp):
                part, part_lse = ops.attention_part(*_views(piece, q, there), causal=piece.causal, scale=scale)
                _merge(*(x[piece.rows, :, piece.queries] for x in (out, lse)), part, part_lse)
        out = out.to(q.dtype)
        ctx.save_for_backward(q, block, out, lse)
        ctx.rest = partition, group, ops, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:
        q, block, out, lse = ctx.saved_tensors
        partition, group, ops, scale = ctx.rest
        rank = dist.get_rank(group)
        grad_q = torch.zeros_like(q, dtype=lse.dtype)
        grad_block = own = torch.zeros_like(block, dtype=lse.dtype)
        behind = None
        for step, there in enumerate(_rotate(block, group)):
            if step:
                grad_block = torch.zeros_like(own)
            for piece in partition.pieces(rank, (rank - step) % partition.cp):
                views = _views(piece, q, there)
                above, merged, total = (x[piece.rows, :, piece.queries] for x in (grad, out, lse))
                parts = ops.attention_part_backward(above, *views, merged, total, causal=piece.causal, scale=scale)
                for whole, part in zip(_views(piece, grad_q, grad_block), parts):
                    whole.add_(part)
            if step:  # what the ranks before found for this block comes in one step behind it, and goes on to its owner
                behind = _Passing(grad_block if behind is None else grad_block.add_(behind.wait()), group)
        if behind is not None:
            own.add_(behind.wait())
        grad_k, grad_v = own.split([q.shape[-1], own.shape[-1] - q.shape[-1]], dim=-1)
        return grad_q.to(q.dtype), grad_k.to(q.dtype), grad_v.to(q.dtype), None, None, None, None


def ring_attention(
    q: Tensor, k: Tensor, v: Tensor, partition: Partition, *, group: dist.ProcessGroup, ops: Ops, scale: float | None = None
) -> Tensor:
    """Causal attention of this rank's q [B,H,L,d] to all ranks' keys k [B,K,L,d] and values v [B,K,L,dv]: [B,H,L,dv], zeros in padding.

    Sums over blocks, and the gradients of keys and values that travel, are in fp32 (fp64 for fp64). `scale` is 1/sqrt(d) by default.
    """
    return _Ring.apply(q, k, v, partition, group, ops, q.shape[-1] ** -0.5 if scale is None else scale)
