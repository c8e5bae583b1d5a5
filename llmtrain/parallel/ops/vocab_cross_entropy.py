"""Cross-entropy fused with a head whose vocabulary is sharded: each rank has the logits of its own range, some rows at a time.

Per piece of rows there is one gather of hidden states, one of two numbers per row (log-sum-exp over the own range, logit of the
target), and one reduce-scatter of the hidden states' gradient. Numbers are computed as in llmtrain.ops.cross_entropy: logits in hidden's
dtype, softmax in fp32 (fp64 for fp64), the weight's gradient summed in fp32 when the weight is narrower.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from llmtrain.ops.cross_entropy import IGNORE, add_product
from llmtrain.parallel.ops.pending import Pending, start_gather, start_scatter_sum
from llmtrain.parallel.ops.vocabulary import first_entry


def vocab_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, vocab_size: int, group: dist.ProcessGroup, chunk: int
) -> Tensor:
    """Sum of -log softmax(hidden @ weight.T)[target] over all positions; the same number on every rank.

    Args:
        hidden: [B,S/t,D], this rank's part of the sequence.
        weight: [~V/t,D], this rank's range of the vocabulary.
        targets: [B,S] int64, -100 for no target; the same on all t ranks.
        chunk: rows of each rank whose logits exist at a time: t*chunk rows by V/t entries.

    Gradients: of hidden whole, of the weight this rank's own. Raises ValueError for shapes that do not fit and a chunk below 1.
    """
    if chunk < 1:
        raise ValueError(f"cross_entropy: chunk={chunk}; train.loss_chunk is a number of rows, at least 1")
    if targets.shape != (hidden.shape[0], hidden.shape[1] * group.size()):
        shapes = f"hidden {tuple(hidden.shape)}, targets {tuple(targets.shape)}"
        raise ValueError(f"vocab_cross_entropy on {group.size()} ranks: {shapes}; needed [B,S/{group.size()},D], [B,S]")
    targets = targets.unflatten(1, (group.size(), -1)).transpose(0, 1).flatten(1)  # [t,n], the order in which rows are gathered
    loss = _Loss(targets, first_entry(vocab_size, group), group, chunk)
    rows = hidden.flatten(0, 1)
    if not torch.is_grad_enabled() or not (hidden.requires_grad or weight.requires_grad):
        return loss.run(rows, weight, (False, False)).loss
    return _VocabCrossEntropy.apply(rows, weight, loss)


class _Result(NamedTuple):
    loss: Tensor
    hidden: Tensor | None
    weight: Tensor | None


class _VocabCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, loss: "_Loss") -> Tensor:
        ctx.save_for_backward(hidden, weight)
        ctx.loss, ctx.result = loss, loss.run(hidden, weight, ctx.needs_input_grad[:2])
        return ctx.result.loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        # As in llmtrain.ops.cross_entropy: a first pass hands its gradients over, a second one computes anew.
        result, ctx.result = ctx.result, None
        if result is None:
            result = ctx.loss.run(*ctx.saved_tensors, ctx.needs_input_grad[:2])
        dtypes = [x.dtype for x in ctx.saved_tensors]
        return *(None if x is None else x.mul_(grad.to(x.dtype)).to(dtype) for x, dtype in zip(result[1:], dtypes)), None


class _Loss:
    """The loss of given targets: `targets` [t,n] by rank and local row, `first` the start of this rank's range of the vocabulary."""

    def __init__(self, targets: Tensor, first: int, group: dist.ProcessGroup, chunk: int):
        self.targets, self.first, self.group, self.chunk = targets, first, group, chunk

    @torch.no_grad()
    def run(self, hidden: Tensor, weight: Tensor, wanted: tuple[bool, ...]) -> _Result:
        """Loss and unscaled gradients of hidden [n,D] and weight [V/t,D], as far as wanted."""
        high = torch.promote_types(hidden.dtype, torch.float32)
        matrix = weight.to(hidden.dtype)
        loss = torch.zeros((), dtype=high, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if wanted[0] else None
        grad_weight = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32)) if wanted[1] else None
        sent: list[tuple[Pending, Tensor]] = []
        locals_, targets = hidden.split(self.chunk), self.targets.split(self.chunk, 1)
        coming = start_gather(locals_[0], self.group)
        for index, target in enumerate(targets):
            here, target = coming, target.flatten()
            if index + 1 < len(locals_):
                coming = start_gather(locals_[index + 1], self.group)
            rows = here.wait()  # [t*chunk,D]
            losses, slope = self._softmax(rows @ matrix.t(), target, high, any(wanted))
            loss += losses.sum()
            if grad_hidden is not None:
                partial = slope @ matrix
                out = grad_hidden[index * self.chunk :][: len(locals_[index])]
                sent.append((start_scatter_sum(partial, self.group, out=out), partial))
                if len(sent) > 1:
                    sent.pop(0)[0].wait()
            if grad_weight is not None:
                add_product(grad_weight, slope.t(), rows)
        for pending, _ in sent:
            pending.wait()
        return _Result(loss, grad_hidden, grad_weight)

    def _softmax(self, logits: Tensor, target: Tensor, high: torch.dtype, slope: bool) -> tuple[Tensor, Tensor | None]:
        """Losses [m] and, if wanted, d loss / d logits [m,V/t] in the logits' dtype; both 0 without a target. Overwrites the logits."""
        wide = logits.to(high)  # the same tensor for fp32 and fp64
        valid, place = target != IGNORE, target - self.first
        own = valid & (place >= 0) & (place < wide.shape[1])
        place = place.masked_fill(~own, 0)[:, None]
        chosen = wide.gather(1, place)[:, 0].masked_fill(~own, 0.0)
        top = wide.amax(1)
        probabilities = torch.softmax(wide, dim=1, out=wide)  # within the own range
        # The largest of them is exp(top - lse).
        lse = top - probabilities.amax(1).log()
        ranges = start_gather(torch.stack((lse, chosen)), self.group).wait().unflatten(0, (-1, 2))  # [t,2,m]
        whole = ranges[:, 0].logsumexp(0)
        losses = (whole - ranges[:, 1].sum(0)).masked_fill(~valid, 0.0)
        if not slope:
            return losses, None
        # masked_fill, not a product: a row of infinities without a target must not turn into nan.
        share = (lse - whole).exp()
        probabilities.mul_(share[:, None])
        probabilities.scatter_add_(1, place, -own[:, None].to(high))
        probabilities.masked_fill_(~valid[:, None], 0.0)
        return losses, probabilities if wide.dtype == logits.dtype else logits.copy_(probabilities)
