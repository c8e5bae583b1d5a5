"""Context parallelism: the ranks of cp share every row. `ContextParallel` parts batches and attends across ranks; `apply_cp` puts it in."""

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llmtrain.config.model import ModelConfig
from llmtrain.data.batch import NO_TARGET, Batch
from llmtrain.errors import UserError
from llmtrain.layout.sequence import Documents, Partition, partition
from llmtrain.ops import Mask, Ops
from llmtrain.parallel.cp_exchange import Order, all_gather, gather_rows, heads_to_sequence, sequence_to_heads
from llmtrain.parallel.cp_ring import ring_attention

KINDS = ("all_gather", "ring", "ulysses")


class ContextParallel:
    """How the ranks of one cp group share rows: which tokens each holds, and attention over all of them.

    `kind` is `parallel.cp_kind`. `multiple` divides the local length: the number of tp ranks, which share it between them.
    Every rank is given the same batches; documents of a batch and of a mask are always those of the whole rows.
    """

    def __init__(self, group: dist.ProcessGroup, kind: str, *, ops: Ops, multiple: int = 1):
        if kind not in KINDS:
            raise UserError(f"parallel.cp_kind={kind}: allowed are {', '.join(KINDS)}")
        self.group, self.kind, self.ops, self.multiple = group, kind, ops, multiple
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)
        # Shared by all layers, and by the pipeline's stages on this rank. It holds no reference to self: a cycle would keep the group alive
        # until the interpreter ends, and gloo's threads abort when they let go of tensors then.
        self._order = lru_cache(maxsize=64)(partial(_order, ranks=self.ranks, multiple=multiple))

    @property
    def layouts_made(self) -> int:
        """How often the index tensors of a layout of documents were made; layers and pipeline stages share those of a micro-batch."""
        return self._order.cache_info().misses

    def partition(self, documents: Documents) -> Partition:
        """Who holds what of rows with these documents; made once per layout."""
        return partition(documents, self.ranks, self.multiple)

    def local_length(self, documents: Documents) -> int:
        """Tokens of a row on each rank, padding included."""
        return self.partition(documents).local_length

    def split_tensor(self, whole: Tensor, documents: Documents | None, fill: float) -> Tensor:
        """This rank's places of [B, S, ...] as [B, L, ...]; `fill` in padding. None for documents is one per row."""
        order = self._order(_explicit(documents, whole), whole.device)
        return order.local(whole.transpose(0, 1), self.rank, fill).transpose(0, 1).contiguous()

    def split(self, batch: Batch) -> Batch:
        """This rank's part of a batch [B, L]: token 0, position 0 and no target in padding; `documents` are explicit, of whole rows."""
        documents = _explicit(batch.documents, batch.tokens)
        fills = {"tokens": 0, "targets": NO_TARGET, "positions": 0}
        parts = {name: self.split_tensor(getattr(batch, name), documents, fill) for name, fill in fills.items()}
        return replace(batch, documents=documents, **parts)

    @torch.no_grad()
    def join(self, local: Tensor, documents: Documents | None, seq_len: int) -> Tensor:
        """The inverse of `split_tensor`: [B, L, ...] of every rank -> [B, S, ...] on every rank. Has no gradient."""
        rows = documents if documents is not None else ((seq_len,),) * local.shape[0]
        joined = all_gather(local.transpose(0, 1), self.group)
        return self._order(rows, local.device).whole(joined).transpose(0, 1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, mask: Mask, cache: Any = None) -> Tensor:
        """In the place of `Attention.attend`: q [B,H,L,d], k [B,K,L,d], v [B,K,L,dv] of this rank -> [B,H,L,dv], zeros in padding.

        Raises UserError for a cache, which would hold whole rows, and for what the kind cannot serve.
        """
        if cache is not None:
            raise UserError(f"a key-value cache under parallel.cp {self.ranks}: generate without one, or with parallel.cp: 1")
        if mask.documents is None or not mask.causal:
            raise ValueError("attention under parallel.cp is causal and needs the documents that ContextParallel.split gave")
        _check(self.kind, heads=q.shape[1], window=mask.window, cp=self.ranks, tp=self.multiple)
        length = self.local_length(mask.documents)
        if q.shape[2] != length:
            raise ValueError(f"attention under parallel.cp: {q.shape[2]} queries, but rows of these documents hold {length} on a rank")
        return getattr(self, f"_{self.kind}")(q, k, v, mask)

    def _all_gather(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
        """All keys and values on every rank; each chunk of queries with the keys of its document up to the chunk's end."""
        order = self._order(mask.documents, q.device)
        both = torch.cat([k, v], dim=-1).permute(2, 0, 1, 3)  # [L,B,K,d+dv]
        whole = gather_rows(both, order, self.group).permute(1, 2, 0, 3)  # [B,K,S,d+dv]
        groups = self.partition(mask.documents).groups
        sizes = [rows.stop - rows.start for rows, _ in groups]
        parts = zip(groups, q.split(sizes), whole.split(sizes))
        outs = [torch.cat(list(self._chunks(queries, keys, k.shape[-1], row, mask)), dim=2) for (_, row), queries, keys in parts]
        return outs[0] if len(outs) == 1 else torch.cat(outs)

    def _chunks(self, q: Tensor, whole: Tensor, width: int, row: int, mask: Mask) -> Iterator[Tensor]:
        """Outputs of this rank's chunks in the rows of one layout, in local order, then zeros for padding."""
        parts = self.partition(mask.documents).parts[row][self.rank]
        runs = [(run, index) for index, part in enumerate(parts) for run in part.runs]
        sizes = [len(run) for run, _ in runs]
        documents = whole.split(mask.documents[row], dim=2)
        *queries, padding = q.split([*sizes, q.shape[2] - sum(sizes)], dim=2)
        for (run, index), query in zip(runs, queries):
            first = 0 if mask.window is None else max(0, run.start - mask.window + 1)
            keys, values = documents[index][:, :, first : run.stop].split([width, whole.shape[-1] - width], dim=-1)
            piece = Mask(causal=True, window=mask.window)
            yield self.ops.attention(query, keys, values, mask=piece, q_offset=run.start, kv_offset=first)
        if padding.shape[2]:
            # The empty sums keep a rank that holds nothing but padding in the graph: its backward pass has to meet the others' too.
            yield q.new_zeros(*padding.shape[:3], whole.shape[-1] - width) + q[:, :, :0].sum() + whole[:, :, :0].sum()

    def _ring(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
        """Keys and values travel round the ranks."""
        return ring_attention(q, k, v, self.partition(mask.documents), group=self.group, ops=self.ops)

    def _ulysses(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
        """Each rank attends in whole rows with its share of the heads. Key heads are repeated where cp does not divide them."""
        order = self._order(mask.documents, q.device)
        repeat = math.lcm(k.shape[1], self.ranks) // k.shape[1]
        k, v = (x.repeat_interleave(repeat, dim=1) if repeat > 1 else x for x in (k, v))
        # Rank by rank, the numbers of its heads of q, k and v behind each other: [L,B,n,F].
        sent = [x.permute(2, 0, 1, 3).unflatten(2, (self.ranks, -1)).flatten(3) for x in (q, k, v)]
        whole = sequence_to_heads(torch.cat(sent, dim=-1), order, self.group)  # [S,B,F]
        parts = whole.split([x.shape[-1] for x in sent], dim=-1)
        rows = [part.unflatten(2, (-1, x.shape[-1])).permute(1, 2, 0, 3) for part, x in zip(parts, (q, k, v))]  # [B,H/n,S,d]
        out = self.ops.attention(*rows, mask=mask)
        back = heads_to_sequence(out.permute(2, 0, 1, 3).flatten(2), order, self.group)  # [L,B,n,H/n*dv]
        return back.unflatten(3, (-1, v.shape[-1])).flatten(2, 3).permute(1, 2, 0, 3)


def check_cp(model: ModelConfig, kind: str, *, cp: int, tp: int) -> None:
    """Raise UserError where parallel.cp_kind `kind` cannot serve attention of this model, whose heads `tp` ranks share."""
    _check(kind, heads=model.attention.heads // tp, window=model.attention.window, cp=cp, tp=tp)


def _check(kind: str, *, heads: int, window: int | None, cp: int, tp: int) -> None:
    """`heads` are those of one rank."""
    if kind == "ring" and window is not None:
        raise UserError(f"parallel.cp_kind=ring knows no window (model.attention.window={window}); use parallel.cp_kind: all_gather")
    if kind == "ulysses" and heads % cp:
        shared = f" / parallel.tp {tp} = {heads}" if tp > 1 else ""
        total = f"model.attention.heads {heads * tp}{shared}"
        raise UserError(f"parallel.cp_kind=ulysses: {total} is no multiple of parallel.cp {cp}; use parallel.cp_kind: all_gather or ring")


def apply_cp(model: nn.Module, cp: ContextParallel) -> None:
    """Let every block of `model`, those of MTP heads too, attend across the ranks of `cp`. Parameters stay as they are.

    Raises UserError where the kind cannot serve the model, or a block has no `attention.attend`.
    """
    check_cp(model.cfg, cp.kind, cp=cp.ranks, tp=cp.multiple)
    heads = {f"mtp.{index}": head.block for index, head in enumerate(getattr(model, "mtp", None) or ())}
    for name, block in [*model.blocks.items(), *heads.items()]:
        attention = getattr(block, "attention", None)
        if not hasattr(attention, "attend"):
            raise UserError(f"parallel.cp {cp.ranks}: block {name} ({type(block).__name__}) has no attention.attend; set parallel.cp: 1")
        attention.attend = cp.attend


def _order(documents: Documents, device: torch.device, *, ranks: int, multiple: int) -> Order:
    return Order(partition(documents, ranks, multiple), device)


def _explicit(documents: Documents | None, rows: Tensor) -> Documents:
    return documents if documents is not None else ((rows.shape[1],),) * rows.shape[0]
