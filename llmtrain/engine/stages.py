"""This rank's part of the model: one whole model, or the stages of a pipeline, and how a step goes through them."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llmtrain.config.run import RunConfig
from llmtrain.device.base import Device
from llmtrain.device.dtypes import torch_dtype
from llmtrain.engine.expert_usage import Seen, build_usage, with_loss
from llmtrain.engine.micro_batch import MicroBatch
from llmtrain.layout.balance import Groups
from llmtrain.layout.pipeline import PipelinePlan
from llmtrain.model import family
from llmtrain.model.lora import add_adapters
from llmtrain.ops import Ops
from llmtrain.parallel.apply import apply, stage_models
from llmtrain.parallel.compile import decide
from llmtrain.parallel.copies import EmbeddingCopy
from llmtrain.parallel.cp import ContextParallel
from llmtrain.parallel.fsdp import local_tensor, set_gradient_sync
from llmtrain.parallel.hang import where
from llmtrain.parallel.mesh import Mesh
from llmtrain.parallel.pipeline import Pipeline, from_stage

COPY = "embedding.weight, last stage"
"""The name in `Stages.copies` of the last stage's second embedding."""


def build_stages(cfg: RunConfig, *, mesh: Mesh, device: Device, ops: Ops) -> "Stages":
    """Build this rank's stages on meta, apply the mesh, give them memory; they are left empty."""
    shape = mesh.shape
    cp = ContextParallel(mesh.group("cp"), cfg.parallel.cp_kind, ops=ops, multiple=shape.tp) if shape.cp > 1 else None
    plan = PipelinePlan.from_config(cfg) if shape.pp > 1 else None
    compiled = decide(cfg, kind=device.kind, ranks=mesh.world).on
    params = torch_dtype(cfg.precision.params)

    def whole() -> nn.Module:
        model = family.build(cfg.model, ops, cfg.train.loss_chunk).to(params)
        if cfg.lora.rank:
            add_adapters(model, cfg.lora)
        return model

    parts = stage_models(whole, plan=plan, rank=mesh.place("pp"))
    partial = [apply(part, cfg, mesh=mesh, device=device, cp=cp, compiled=compiled) for part in parts.values()]
    return Stages(cfg, parts, partial, mesh=mesh, device=device, cp=cp, plan=plan, compiled=compiled)


@dataclass
class _Sizes:
    """What hidden states between stages, and logits, look like."""

    hidden: int
    vocab: int
    tp: int
    dtype: torch.dtype

    def of(self, micro: MicroBatch) -> tuple[int, int, int]:
        rows, length = micro.tokens.shape
        return rows, length // self.tp, self.hidden


class Stages:
    """The models of this rank by stage number, and their parameters by canonical name, frozen ones included.

    `copies` holds a parameter that stands for one of another stage; `partial` names the parameters whose gradients are to be summed
    over tp.
    """

    def __init__(
        self,
        cfg: RunConfig,
        parts: dict[int, nn.Module],
        partial: Sequence[set[str]],
        *,
        mesh: Mesh,
        device: Device,
        cp: ContextParallel | None,
        plan: PipelinePlan | None,
        compiled: bool,
    ):
        self.parts, self.mesh, self.cp, self.plan, self.compiled = parts, mesh, cp, plan, compiled
        self.called: dict[int, Callable] = dict(parts)
        """What is called in the place of each part, where something is wrapped around it."""
        self.parameters: dict[str, nn.Parameter] = {}
        self.copies: dict[str, nn.Parameter] = {}
        self.partial: list[str] = []
        self.sizes = _Sizes(cfg.model.hidden, cfg.model.vocab_size, mesh.shape.tp, torch_dtype(cfg.precision.compute))
        for (stage, part), names in zip(parts.items(), partial):
            for name, parameter in part.named_parameters():
                copied = stage > 0 and name == "embedding.weight"
                (self.copies if copied else self.parameters)[COPY if copied else name] = parameter
                if name in names:
                    self.partial.append(COPY if copied else name)
        self.pipeline = self._pipeline(device, overlap=cfg.parallel.overlap_micro_batches) if plan else None
        self.embedding_copy = self._embedding_copy(cfg)
        self.usage = build_usage(parts, cfg.model, mesh)
        """How the step uses the experts; None without a mixture of experts."""

    def _pipeline(self, device: Device, *, overlap: bool) -> Pipeline:
        place = {"group": self.mesh.group("pp"), "device": device.torch_device}
        return Pipeline(self.parts, **place, overlap=overlap, enter_thread=device.set_current)

    def _embedding_copy(self, cfg: RunConfig) -> EmbeddingCopy | None:
        if self.plan is None or not self.plan.copies_embedding:
            return None
        first, last = self.plan.rank_of(0), self.plan.rank_of(self.plan.stages - 1)
        if self.mesh.place("pp") not in (first, last):
            return None
        original, copy = self.parameters.get("embedding.weight"), self.copies.get(COPY)
        return EmbeddingCopy(original, copy, group=self.mesh.group("pp"), first=first, last=last)

    def refresh_copy(self, moments: dict[str, tuple[Tensor, Tensor]]) -> None:
        """Make the copy of a parameter, and its moments, equal to what was loaded for it."""
        copy = self.embedding_copy
        if copy is None:
            return
        tensors = [
            None if p is None else (local_tensor(p.detach()), *moments.get(name, ()))
            for p, name in ((copy.original, "embedding.weight"), (copy.copy, COPY))
        ]
        for at in range(max(len(held) for held in tensors if held is not None)):  # a frozen one has no moments
            copy.take_over(*(None if held is None else held[at] for held in tensors))

    def _call(self, stage: int, micro: MicroBatch, entered: Tensor | None, *, targets: bool) -> dict[str, Tensor]:
        model = self.parts[stage]
        wanted = {"targets": micro.targets} if targets and getattr(model, "last_stage", True) else {}
        if wanted and micro.ahead:
            wanted["ahead"] = micro.ahead
        rope = micro.rope(model, self.sizes.dtype)
        shared = {} if rope is None else {"rope": rope}
        x = micro.tokens if entered is None else entered
        return self.called[stage](x, positions=micro.positions, mask=micro.mask, **wanted, **shared)

    def train(
        self, micros: Sequence[MicroBatch], *, objective: Callable[[dict], Tensor], scale: float, factor: float = 1.0
    ) -> list[Tensor]:
        """Forward and backward of `objective` * scale over all micro-batches: the bare objectives, [] without the last stage.

        What balances experts comes on top, multiplied by `factor`.
        """
        window = 1 if self.usage is None else self.usage.begin_step(self._groups(micros), factor=factor)
        if self.pipeline is not None:
            return self._train_pipeline(micros, objective, scale)
        losses = []
        for first in range(0, len(micros), window):
            losses += self._train_window(micros, range(first, first + window), objective, scale)
        return losses

    def _groups(self, micros: Sequence[MicroBatch]) -> Groups:
        rows, length = micros[0].tokens.shape
        shape = self.mesh.shape
        sizes = {"batch": len(micros) * rows * shape.dp, "rows": rows, "seq_len": length * shape.cp, "ranks": shape.dp}
        return Groups.of_step(self.usage.ffn.balance, **sizes)

    def _train_window(self, micros: Sequence[MicroBatch], window: range, objective: Callable, scale: float) -> list[Tensor]:
        """Forward passes of the micro-batches `window`, which share what balances experts, then their backward passes."""
        losses, seen = [], []
        for index in window:
            where.at(micro_batch=index)
            outputs, uses = self._watched(0, micros[index], None)
            losses.append(objective(outputs))
            seen.append(uses)
        extras = [None] * len(window) if self.usage is None else self.usage.losses(0, seen)
        for index, loss, extra in zip(window, losses, extras):
            where.at(micro_batch=index)
            total = loss * scale
            self.backward(total if extra is None else total + extra, last=index == len(micros) - 1)
        return [loss.detach() for loss in losses]

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """The backward pass of one micro-batch without a pipeline; after the `last` of a step, gradients are whole."""
        set_gradient_sync(self.parts[0], last)
        loss.backward()

    def _watched(self, stage: int, micro: MicroBatch, entered: Tensor | None) -> tuple[dict[str, Tensor], Seen]:
        """A forward pass with targets, and how it used the experts."""
        with nullcontext([]) if self.usage is None else self.usage.watching() as seen:
            return self._call(stage, micro, entered, targets=True), seen

    def _train_pipeline(self, micros: Sequence[MicroBatch], objective: Callable, scale: float) -> list[Tensor]:
        losses: dict[int, Tensor] = {}

        def forward(stage: int, index: int, entered: Tensor | None) -> Tensor:
            outputs, seen = self._watched(stage, micros[index], entered)
            (extra,) = [None] if self.usage is None else self.usage.losses(stage, [seen])
            if "hidden" in outputs:
                return with_loss(outputs["hidden"], extra)
            loss = objective(outputs)
            losses[index] = loss.detach()
            return with_loss(loss * scale, extra)

        schedule = self.plan.schedule(len(micros))
        self.pipeline.run(schedule, forward, shape=lambda m: self.sizes.of(micros[m]), dtype=self.sizes.dtype)
        return [losses[index] for index in sorted(losses)]

    def infer(self, micros: Sequence[MicroBatch], *, output: str) -> list[Tensor]:
        """`ce_sum` or `logits` of every micro-batch, without gradients; [] without the last stage."""
        targets = output == "ce_sum"
        if self.pipeline is None:
            return [self._call(0, micro, None, targets=targets)[output] for micro in micros]

        def forward(stage: int, index: int, entered: Tensor | None) -> Tensor:
            outputs = self._call(stage, micros[index], entered, targets=targets)
            return outputs["hidden"] if "hidden" in outputs else outputs[output]

        schedule = self.plan.forwards(len(micros))
        found = self.pipeline.run(schedule, forward, shape=lambda m: self.sizes.of(micros[m]), dtype=self.sizes.dtype, backward=False)
        return [found[index] for index in sorted(found)]

    def logits(self, micro: MicroBatch, *, rows: int, seq_len: int) -> Tensor:
        """Logits [rows,seq_len,V] on every rank."""
        found = self.infer([micro], output="logits")
        logits = found[0] if found else None
        if logits is not None:
            logits = self.cp.join(logits, micro.mask.documents, seq_len) if self.cp is not None else logits[:, :seq_len]
        if self.plan is None:
            return logits
        shape, dtype, last = (rows, seq_len, self.sizes.vocab), self.sizes.dtype, self.plan.rank_of(self.plan.stages - 1)
        return from_stage(logits, shape, dtype, group=self.mesh.group("pp"), source=last, device=self.pipeline.device)
