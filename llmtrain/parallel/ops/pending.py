"""Collectives over rows that run while something else is computed."""

from dataclasses import dataclass, field

import torch.distributed as dist
from torch import Tensor

from llmtrain.compat import all_gather_rows, reduce_scatter_rows
from llmtrain.parallel.hang.where import Begun


@dataclass(frozen=True)
class Pending:
    """A tensor that collectives still write to."""

    tensor: Tensor
    works: list[Begun] = field(default_factory=list)

    def wait(self) -> Tensor:
        """The tensor, written; on an accelerator, once its current stream has come so far."""
        for work in self.works:
            work.wait()
        return self.tensor


def start_gather(rows: Tensor, group: dist.ProcessGroup, *, out: Tensor | None = None) -> Pending:
    """Rows [n, ...] of all t ranks of `group`, one rank after the other: [t*n, ...], in `out` if given."""
    if out is None:
        out = rows.new_empty(group.size() * rows.shape[0], *rows.shape[1:])
    begun = Begun("all_gather", group)
    return Pending(out, [begun.by(all_gather_rows(out, rows.contiguous(), group=group, async_op=True))])


def start_scatter_sum(rows: Tensor, group: dist.ProcessGroup, *, out: Tensor | None = None) -> Pending:
    """This rank's [n, ...] of rows [t*n, ...] summed over the t ranks of `group`, in `out` if given."""
    if out is None:
        out = rows.new_empty(rows.shape[0] // group.size(), *rows.shape[1:])
    begun = Begun("reduce_scatter", group)
    return Pending(out, [begun.by(reduce_scatter_rows(out, rows.contiguous(), group=group, async_op=True))])
