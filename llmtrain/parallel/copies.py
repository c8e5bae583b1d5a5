"""The token embedding a second time: the last stage of a pipeline needs it where it is tied to the head, or to predict further ahead."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llmtrain.parallel.hang.where import recorded


class EmbeddingCopy:
    """Keeps the embedding of the last stage equal to that of the first: both take the step that the sum of their gradients asks for.

    `original` and `copy` are this rank's parameters, None for one that another rank holds. `first` and `last` are the ranks, within
    `group`, of the two stages. All ranks of `group` make one and call its methods together.
    """

    def __init__(self, original: nn.Parameter | None, copy: nn.Parameter | None, *, group: dist.ProcessGroup, first: int, last: int):
        self.original, self.copy, self.group, self.first, self.last = original, copy, group, first, last

    @torch.no_grad()
    def sum_gradients(self, local) -> None:
        """Give both the sum of their gradients; `local(tensor)` is this rank's part of one."""
        gradients = [local(p.grad) for p in (self.original, self.copy) if p is not None and p.grad is not None]
        if len(gradients) == 2:
            gradients[0].add_(gradients[1])
            gradients[1].copy_(gradients[0])
        elif gradients:
            other = self._swap(gradients[0])
            gradients[0].add_(other)

    @torch.no_grad()
    def take_over(self, original: Tensor | None, copy: Tensor | None) -> None:
        """Overwrite `copy` by `original`, each on the rank that has it; they may be on the host, where the group's ranks send nothing."""
        if original is not None and copy is not None:
            copy.copy_(original)
        elif original is not None:
            with recorded("send", self.group, peer=dist.get_global_rank(self.group, self.last)):
                dist.send(original.to(self._device).contiguous(), group=self.group, group_dst=self.last)
        elif copy is not None:
            arrived = torch.empty(copy.shape, dtype=copy.dtype, device=self._device)
            with recorded("recv", self.group, peer=dist.get_global_rank(self.group, self.first)):
                dist.recv(arrived, group=self.group, group_src=self.first)
            copy.copy_(arrived)

    @property
    def _device(self) -> torch.device:
        return (self.copy if self.original is None else self.original).device

    def _swap(self, tensor: Tensor) -> Tensor:
        peer = self.last if self.original is not None else self.first
        mine, theirs = tensor.contiguous(), torch.empty_like(tensor, memory_format=torch.contiguous_format)
        ops = [
            dist.P2POp(dist.isend, mine, group=self.group, group_peer=peer),
            dist.P2POp(dist.irecv, theirs, group=self.group, group_peer=peer),
        ]
        with recorded("exchange", self.group, peer=dist.get_global_rank(self.group, peer)):
            for work in dist.batch_isend_irecv(ops):
                work.wait()
        return theirs
