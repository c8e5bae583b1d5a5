"""How a step uses the experts: what the losses that balance them add, what moves the routers' biases, and what is reported."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import get_ident
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llmtrain.config.ffn import MoEConfig
from llmtrain.config.model import ModelConfig
from llmtrain.layout.balance import Groups
from llmtrain.model.moe import MoE
from llmtrain.model.router import Usage
from llmtrain.parallel.hang.where import recorded
from llmtrain.parallel.mesh import Mesh

Seen = list[Usage]
"""Of each mixture of experts of one stage, in order, what one micro-batch asked of it."""


def build_usage(parts: dict[int, nn.Module], model: ModelConfig, mesh: Mesh) -> "ExpertUsage | None":
    """For the stages of this rank; None for a model without experts."""
    return ExpertUsage(parts, model, mesh) if model.ffn.kind == "moe" else None


class ExpertUsage:
    """Watches the mixtures of experts of this rank's stages during the forward passes of a step.

    L layers of the whole model, those of multi-token prediction last; E experts, R ranks that read different samples.
    """

    def __init__(self, parts: dict[int, nn.Module], model: ModelConfig, mesh: Mesh):
        self.ffn, self.mesh = model.ffn, mesh
        self.adds = model.ffn.balance is not None or model.ffn.router.z_loss > 0
        """Whether there is a loss."""
        self.layers = model.expert_layers + model.mtp.heads
        self.modules: dict[int, tuple[str, MoE]] = {}
        """The layers of this rank, and their names, by number."""
        self._seen: Seen | None = None
        self._numbers: dict[int, list[int]] = {}
        for stage, part in parts.items():
            found = {_number(name, model): (name, layer) for name, layer in part.named_modules() if isinstance(layer, MoE)}
            self._numbers[stage] = list(found)
            self.modules |= found
            for _, layer in found.values():
                layer.observe = self._observe
        self.totals: Tensor | None = None
        """[L,E+1] int64 of the last step, the same on every rank: choices of each expert, and how many were dropped."""
        self._sums = self._balance_sum = None

    def _observe(self, usage: Callable[..., Usage]) -> None:
        losses = self.adds and torch.is_grad_enabled()
        watched = self._seen is not None and get_ident() == self._thread  # a backward pass in another thread recomputes
        if not watched and not losses:
            return
        found = usage(losses=losses)  # recomputation has to make the same graph as the forward pass, though nobody looks at it
        if watched:
            self._seen.append(found)

    @contextmanager
    def watching(self) -> Iterator[Seen]:
        """The forward pass of a stage inside is put down in what this gives; others, and recomputation, are not looked at."""
        self._seen, self._thread = (seen := []), get_ident()
        try:
            yield seen
        finally:
            self._seen = None

    # --- losses -------------------------------------------------------------------------------------------------------------------

    def begin_step(self, groups: Groups, *, factor: float) -> int:
        """`groups` are those of the step; losses are multiplied by `factor` (the loss scale).

        Returns the number of micro-batches whose forward passes come before their backward passes.
        """
        self.groups, self._factor = groups, factor
        self._sums, self._balance_sum = None, 0.0
        return groups.window if self.ffn.balance is not None else 1

    def losses(self, stage: int, seen: Sequence[Seen]) -> list[Tensor | None]:
        """What balancing adds to the loss of each of some micro-batches that follow each other, whose forward passes are done.

        Already divided by the numbers of groups and tokens of the whole step. Groups that reach over several of these micro-batches, or
        over other ranks, are summed up here.
        """
        counts = [torch.stack([usage.counts for usage in one]) if one else None for one in seen]  # [l,B,E] each
        if counts[0] is None:
            return [None] * len(seen)
        for one, count in zip(seen, counts):
            self._add(stage, count.sum(1), torch.stack([usage.dropped for usage in one]))
        balance, z_loss = self.ffn.balance, self.ffn.router.z_loss
        found: list[Tensor | None] = [None] * len(seen)
        if balance is not None:
            weight = balance.weight * self._factor
            for at, (one, share) in enumerate(zip(seen, self._shares(counts, seen[0][0].scores.dtype))):
                scores = torch.stack([usage.scores for usage in one])  # [l,B,E]
                found[at] = (share * scores).sum() * (weight / self.groups.count / self.groups.tokens)
        if z_loss:
            for at, one in enumerate(seen):
                squares = torch.stack([usage.squares for usage in one]).sum() * (z_loss * self._factor / self.groups.all_tokens)
                found[at] = squares if found[at] is None else found[at] + squares
        self._balance_sum += sum(loss.detach() for loss in found if loss is not None)
        return found

    def _shares(self, counts: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
        """f of every row, [l,B,E] for each micro-batch: its group's choices of each expert over the even share."""
        groups, device = self.groups, counts[0].device
        numbers, number = groups.numbered(len(counts), self.mesh.data_rank)
        rows_in = [torch.tensor(groups_of_rows, device=device) for groups_of_rows in numbers]
        sums = counts[0].new_zeros(number, *counts[0][:, 0].shape)  # [groups,l,E]
        for count, inside in zip(counts, rows_in):
            sums.index_add_(0, inside, count.transpose(0, 1))
        axes = [axis for axis in ("tp", "cp") if getattr(self.mesh.shape, axis) > 1]
        if groups.over_ranks:
            axes += [axis for axis in ("dp_shard", "dp_replicate") if getattr(self.mesh.shape, axis) > 1]
        for axis in axes:
            with recorded("all_reduce", self.mesh.group(axis)):
                dist.all_reduce(sums, group=self.mesh.group(axis))
        even = self.ffn.top_k * groups.tokens / self.ffn.experts
        return [(sums[inside].to(dtype) / even).transpose(0, 1) for inside in rows_in]

    # --- the step as a whole ------------------------------------------------------------------------------------------------------

    def _add(self, stage: int, counts: Tensor, dropped: Tensor) -> None:
        if self._sums is None:
            self._sums = torch.zeros(self.layers, self.ffn.experts + 1, dtype=torch.int64, device=counts.device)
        self._sums[self._numbers[stage]] += torch.cat((counts, dropped[:, None]), 1)

    def end_step(self) -> float:
        """Sum up the step over all ranks; returns this rank's share of the losses, to be summed over all."""
        if self._sums is None:  # stages without experts
            device = self.mesh.device.torch_device
            self._sums = torch.zeros(self.layers, self.ffn.experts + 1, dtype=torch.int64, device=device)
        if self.mesh.world > 1:
            with recorded("all_reduce", "world"):
                dist.all_reduce(self._sums)
        self.totals = self._sums
        return float(self._balance_sum) / self._factor

    @torch.no_grad()
    def move_biases(self) -> None:
        """One step of the routers' biases towards experts that got too few of the last step's tokens (arXiv 2408.15664)."""
        rate = self.ffn.router.bias_rate
        if not rate or self.totals is None:
            return
        counts = self.totals[:, :-1]
        missing = counts.sum(1, keepdim=True) - self.ffn.experts * counts  # whole numbers, so that no rank rounds another way
        for number, (_, layer) in self.modules.items():
            layer.router.bias.add_(missing[number].sign(), alpha=rate)

    def biases(self) -> dict[int, float]:
        """Norm of the bias of this rank's layers, by number; {} without biases."""
        if self.ffn.router.bias_rate is None:
            return {}
        return {number: float(layer.router.bias.norm()) for number, (_, layer) in self.modules.items()}

    def metrics(self) -> dict[str, Any]:
        """`shares_of` the last step."""
        return shares_of(self.totals, self.ffn)


def shares_of(totals: Tensor, ffn: MoEConfig) -> dict[str, Any]:
    """What is reported of `totals` [L,E+1], choices of each expert and dropped ones, by layer, from block `first_layer` on.

    `load` is the fullest expert's tokens over the mean; `entropy` that of the experts' shares over that of equal ones; and `dropped` the
    share of choices that found no room, where there is a capacity.
    """
    counts, dropped = totals[:, :-1].double().cpu(), totals[:, -1].double().cpu()
    total = counts.sum(1).clamp_min(1)
    shares = counts / total[:, None]
    entropy = -(shares * shares.clamp_min(1e-300).log()).sum(1) / math.log(max(2, ffn.experts))
    found = {"load": shares.amax(1) * ffn.experts, "entropy": entropy}
    if ffn.capacity is not None:
        found["dropped"] = dropped / total
    layers = {name: [round(value, 6) for value in values.tolist()] for name, values in found.items()}
    return {"first_layer": ffn.dense_layers} | layers


def _number(name: str, model: ModelConfig) -> int:
    """Number among the model's mixtures of experts: `blocks.I.ffn`, `mtp.I.block.ffn`."""
    kind, index, *_ = name.split(".")
    return int(index) - model.ffn.dense_layers if kind == "blocks" else model.expert_layers + int(index)


class _WithLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, loss: Tensor) -> Tensor:
        ctx.like = loss
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, torch.ones_like(ctx.like)


def with_loss(hidden: Tensor, loss: Tensor | None) -> Tensor:
    """`hidden`, whose backward pass also runs that of the scalar `loss`, with gradient 1."""
    return hidden if loss is None else _WithLoss.apply(hidden, loss)
