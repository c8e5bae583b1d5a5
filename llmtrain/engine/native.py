"""The native engine: PyTorch's own pieces on every axis of the mesh."""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import torch
import torch.distributed as dist

from llmtrain.compat import compile_seconds
from llmtrain.config.run import RunConfig
from llmtrain.data.batch import NO_TARGET, Batch
from llmtrain.device.base import Device
from llmtrain.engine.base import Capabilities, StepResult, register_engine
from llmtrain.engine.expert_placement import Settled, build_placement
from llmtrain.engine.host_optimizer import HostOptimizer
from llmtrain.engine.local_optimizer import LocalOptimizer
from llmtrain.engine.loss_scale import LossScale
from llmtrain.engine.micro_batch import MicroBatch, prepare
from llmtrain.engine.stages import Stages, build_stages
from llmtrain.errors import UserError
from llmtrain.model.init import branch_moments, branch_std, initialise, set_post_norm_gamma
from llmtrain.ops import Ops
from llmtrain.parallel.compile import eager
from llmtrain.parallel.fsdp import local_tensor, release_gathered
from llmtrain.parallel.gradients import holders, square_sum, sum_gradients
from llmtrain.parallel.hang.where import device_wait, recorded
from llmtrain.parallel.mesh import Mesh
from llmtrain.parallel.placement import canonical

AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp", "ep")


@register_engine("native")
def build(cfg: RunConfig, *, objective: Callable[[dict], torch.Tensor], mesh: Mesh, device: Device, ops: Ops) -> "NativeEngine":
    """Build this rank's stages of the model and fill them. Raises UserError for what the engine cannot run."""
    precision = cfg.precision
    if precision.accumulate != precision.reduce:
        raise UserError(
            f"engine native accumulates gradients in the format it reduces them in: set precision.accumulate ({precision.accumulate}) "
            f"and precision.reduce ({precision.reduce}) alike"
        )
    if precision.optimizer != precision.params:
        raise UserError(
            f"engine native keeps moments in the parameters' format: set precision.optimizer ({precision.optimizer}) "
            f"and precision.params ({precision.params}) alike"
        )
    stages = build_stages(cfg, mesh=mesh, device=device, ops=ops)
    for part in stages.parts.values():
        # What is pretrained is read before the first step.
        initialise(part, cfg.model, cfg.seed, adapters_only=cfg.model.pretrained is not None)
    return NativeEngine(cfg, stages=stages, objective=objective, mesh=mesh, device=device, ops=ops)


class NativeEngine:
    """Forward and backward over micro-batches, AdamW, and the canonical state of both."""

    def __init__(self, cfg: RunConfig, *, stages: Stages, objective: Callable, mesh: Mesh, device: Device, ops: Ops):
        self.cfg, self.stages, self.objective, self.mesh, self.device = cfg, stages, objective, mesh, device
        self.parameters = stages.parameters
        self.optimizer = self._optimizer(ops)
        self.placement = build_placement(cfg, stages=stages, optimizer=self.optimizer, mesh=mesh)
        self.steps_taken = 0
        self.loss_scale = LossScale(cfg.precision.loss_scale) if cfg.precision.compute == "fp16" else None
        self._norm: float | None = None
        self._eager = eager if stages.compiled else nullcontext  # the context brings the compiler's import with it

    def _optimizer(self, ops: Ops) -> LocalOptimizer | HostOptimizer:
        kind = partial(HostOptimizer, copies=self.device.host_copies()) if self.cfg.optim.offload else LocalOptimizer
        held = self.stages.parameters | self.stages.copies
        trained = {name: parameter for name, parameter in held.items() if parameter.requires_grad}
        return kind(trained, self.cfg.optim, ops=ops)

    def capabilities(self) -> Capabilities:
        """Every axis, every format; steps can be discarded."""
        return Capabilities(discard=True, axes=AXES, dtypes=("fp64", "fp32", "bf16", "fp16"), adapters=True)

    # --- a step -------------------------------------------------------------------------------------------------------------------

    def forward_backward(self, micro_batches: Sequence[Batch]) -> StepResult:
        """Gradients of the mean over all target tokens of the step; see Engine."""
        settled = self.placement.settle() if self.placement else Settled()
        total, compiling = self._count_targets(micro_batches), compile_seconds()
        factor = self._factor()
        prepared = self._prepared(micro_batches, heads=self.cfg.model.mtp.heads)
        losses = self.stages.train(prepared, objective=self.objective, scale=factor / total, factor=factor)
        self._complete_gradients()
        values = self._values(losses)
        shares = self._share(values), self._square_sum(), *self._expert_shares()
        loss_sum, square, *experts = self.mesh.sum(*shares)  # one message for all
        self._norm = math.sqrt(square)
        compiling = compile_seconds() - compiling
        metrics = ({"compile_seconds": compiling} if compiling else {}) | settled.metrics | self._expert_metrics(experts)
        counts = None if self.stages.usage is None else self.stages.usage.totals[:, :-1]
        result = self._result(micro_batches, values, loss_sum, total, metrics)
        return replace(result, expert_counts=counts, events=settled.events)

    def _factor(self) -> float:
        """What losses are multiplied by before they are differentiated, beside the target count."""
        return self.loss_scale.value if self.loss_scale else 1.0

    def _expert_shares(self) -> list[float]:
        """What this rank brings to the loss that balances experts, and to the norms of the routers' biases by layer."""
        usage = self.stages.usage
        if usage is None:
            return []
        balance, norms, mine = usage.end_step(), [0.0] * usage.layers, usage.biases()
        if self.placement is not None:
            self.placement.add()
        if not any(map(self.mesh.place, ("dp_replicate", "dp_shard", "cp", "tp"))):
            for layer, norm in mine.items():
                norms[layer] = norm
        return [balance, *(norms if self.cfg.model.ffn.router.bias_rate is not None else [])]

    def _expert_metrics(self, sums: list[float]) -> dict:
        usage = self.stages.usage
        if usage is None:
            return {}
        layers = usage.metrics() | ({"bias": sums[1:]} if len(sums) > 1 else {})
        if self.placement is not None:
            layers |= self.placement.metrics()
        return ({"balance_loss": sums[0]} if usage.adds else {}) | {"experts": layers}

    def _prepared(self, batches: Sequence[Batch], *, heads: int = 0) -> list[MicroBatch]:
        whole = {"device": self.device, "cp": self.stages.cp, "multiple": self.mesh.shape.tp, "heads": heads}
        return [prepare(batch, **whole) for batch in batches]

    def _count_targets(self, micro_batches: Sequence[Batch]) -> int:
        # Ranks that differ along pp, cp and tp alone have read the same samples.
        total = int(self.mesh.sum(sum(batch.target_count for batch in micro_batches), axes=("dp_replicate", "dp_shard"))[0])
        if total == 0:
            raise UserError("a step holds no target token: every document in it is one token long; check the data or data.document_mask")
        return total

    def _complete_gradients(self) -> None:
        if self.stages.partial:
            partial = [local_tensor(self.optimizer.parameters[name].grad) for name in self.stages.partial]
            sum_gradients(partial, self.mesh.group("tp"))
        if self.stages.embedding_copy is not None:
            self.stages.embedding_copy.sum_gradients(local_tensor)

    def _values(self, losses: Sequence[torch.Tensor]) -> list[float]:
        with device_wait():
            return torch.stack(list(losses)).double().tolist() if losses and self.device.kind == "cpu" else [loss.item() for loss in losses]

    def _share(self, values: Sequence[float]) -> float:
        """What this rank brings to the sum of losses: ranks of tp all have the same."""
        return 0.0 if self.mesh.place("tp") else math.fsum(values)

    def _result(
        self, micro_batches: Sequence[Batch], values: list[float], loss_sum: float, total: int, metrics: dict | None = None
    ) -> StepResult:
        """`values` are this rank's losses by micro-batch, none on ranks without the last stage; `loss_sum` that of all ranks."""
        bad: tuple[int, ...] = ()
        if not math.isfinite(loss_sum):
            mine = [s for batch, value in zip(micro_batches, values) if not math.isfinite(value) for s in batch.samples]
            bad = tuple(sorted({sample for part in self.mesh.gather(mine) for sample in part}))
        return StepResult(loss_sum=loss_sum, target_count=total, metrics=metrics or {}, bad_samples=bad)

    def _gradients(self) -> list[torch.Tensor]:
        return [local_tensor(p.grad) for p in self.optimizer.parameters.values() if p.grad is not None]

    @torch.no_grad()
    def _square_sum(self) -> float:
        """This rank's share of the squared norm of all gradients, from which the loss scale is taken first."""
        if self.loss_scale:
            for gradient in self._gradients():
                gradient.mul_(1.0 / self.loss_scale.value)
        ranks = self.mesh.world // self.mesh.shape.pp
        parameters = [p for p in self.parameters.values() if p.grad is not None]
        return square_sum([local_tensor(p.grad) for p in parameters], [holders(p, ranks) for p in parameters])

    def grad_norm(self) -> float:
        """Global 2-norm of the (unscaled) gradients, which forward_backward summed up along with the loss."""
        if self._norm is None:
            raise RuntimeError("there are no gradients: call forward_backward first")
        return self._norm

    def overflowed(self) -> bool:
        """Whether fp16 gradients overflowed the loss scale."""
        return self.loss_scale is not None and not math.isfinite(self.grad_norm())

    @torch.no_grad()
    def apply(self, *, lr: float) -> None:
        """Clip to optim.max_grad_norm and take an AdamW step at `lr`."""
        norm, limit = self.grad_norm(), self.cfg.optim.max_grad_norm
        if limit is not None and norm > limit:
            for gradient in self._gradients():
                gradient.mul_(limit / norm)
        self.optimizer.step(lr=lr)
        if self.stages.usage is not None:
            self.stages.usage.move_biases()
        self.steps_taken += 1
        self._drop(finite=True)

    def discard(self) -> None:
        """Drop the gradients; an fp16 overflow also shrinks the loss scale."""
        self._drop(finite=not self.overflowed())

    def _drop(self, *, finite: bool) -> None:
        if self.loss_scale:
            self.loss_scale.update(finite=finite)
        self.optimizer.zero_grad()
        self._norm = None

    # --- without gradients --------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self, micro_batches: Sequence[Batch]) -> StepResult:
        """The loss without gradients. Every rank brings the same number of micro-batches."""
        total = self._count_targets(micro_batches)
        with self._eager():
            values = self._values(self.stages.infer(self._prepared(micro_batches), output="ce_sum"))
        return self._result(micro_batches, values, self.mesh.sum(self._share(values))[0], total)

    @torch.no_grad()
    def logits(self, tokens: torch.Tensor, *, positions: torch.Tensor | None = None) -> torch.Tensor:
        """Logits [B, S, V] of tokens [B, S]; every rank gives the same tokens."""
        if positions is None:
            positions = torch.arange(tokens.shape[1])[None].expand_as(tokens)
        nothing = torch.full_like(tokens, NO_TARGET)
        batch = Batch(tokens=tokens, targets=nothing, positions=positions, documents=None, samples=())
        (micro,) = self._prepared([batch])
        with self._eager():
            return self.stages.logits(micro, rows=len(tokens), seq_len=tokens.shape[1])

    def begin_phase(self, *, rope_base: float) -> None:
        """Set the phase's RoPE base."""
        if self.cfg.model.position.kind == "rope":
            for part in self.stages.parts.values():
                part.set_rope_base(rope_base)

    @torch.no_grad()
    def calibrate(self, batch: Batch) -> dict[str, float]:
        """Set post-norm gammas from the branches' output std on `batch` (the same on every rank), where norm.c_* is `auto`."""
        norm = self.cfg.model.norm
        if norm.placement != "depth_scaled_sandwich" or "auto" not in (norm.c_attention, norm.c_ffn):
            return {}
        (micro,) = self._prepared([batch])
        with self._eager():
            moments = branch_moments(
                self.stages.parts.values(), lambda: self.stages.infer([micro], output="ce_sum"), real=self._real_positions(batch)
            )
        for axis in ("tp", "cp", "pp"):
            if getattr(self.mesh.shape, axis) > 1:
                with recorded("all_reduce", self.mesh.group(axis)):
                    dist.all_reduce(moments, group=self.mesh.group(axis))
        with device_wait():
            attention, ffn = branch_std(moments)
        c_attention = attention if norm.c_attention == "auto" else norm.c_attention
        c_ffn = ffn if norm.c_ffn == "auto" else norm.c_ffn
        self._set_post_norms(c_attention, c_ffn)
        return {"c_attention": c_attention, "c_ffn": c_ffn}

    def _set_post_norms(self, c_attention: float, c_ffn: float) -> None:
        for part in self.stages.parts.values():
            release_gathered(part)
            set_post_norm_gamma(part, c_attention, c_ffn)

    def _real_positions(self, batch: Batch) -> torch.Tensor | None:
        """Which positions of the hidden states [B,S] that this rank holds between blocks are tokens of `batch`; None if all are."""
        shape = self.mesh.shape
        if shape.cp * shape.tp == 1:
            return None
        (ones,) = self._prepared([replace(batch, tokens=torch.ones_like(batch.tokens))])  # padding is token 0
        return (ones.tokens == 1).chunk(shape.tp, dim=1)[self.mesh.place("tp")]

    # --- state --------------------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, torch.Tensor]:
        """Live parameters and moments of this rank's stages by canonical name, and the number of steps taken.

        Experts that have moved are brought home first; they are there until the next step.
        """
        if self.placement is not None:
            self.placement.go_home()
        state = {"step": torch.tensor(self.steps_taken, dtype=torch.int64)}
        moments = self.optimizer.moments
        for name, parameter in self.parameters.items():
            parts = local_tensor(parameter.detach()), *moments.get(name, ())  # frozen ones have none
            for kind, part in zip(("weight", "exp_avg", "exp_avg_sq"), parts):
                state[f"{name}.{kind}"] = canonical(parameter, part, self.mesh)
        for part in self.stages.parts.values():
            state |= {f"{name}.weight": canonical(buffer, buffer, self.mesh) for name, buffer in part.named_buffers()}
        return state

    @torch.no_grad()
    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """Copy `state` into the parameters and moments; tensors of state() filled in place are already there."""
        self.steps_taken = int(state["step"])
        for key, mine in self.state().items():
            if key != "step" and local_tensor(mine).data_ptr() != local_tensor(state[key]).data_ptr():
                mine.copy_(state[key])
        self.stages.refresh_copy(self.optimizer.moments)
        self.optimizer.set_steps(self.steps_taken)

    def extra_state(self) -> dict:
        """The loss scale, and where experts are to be, if there are such."""
        found = {"loss_scale": self.loss_scale.state()} if self.loss_scale else {}
        return found | ({"expert_placement": self.placement.state()} if self.placement else {})

    def load_extra_state(self, extra: dict) -> None:
        """Take over what the engine has of it."""
        if self.loss_scale and "loss_scale" in extra:
            self.loss_scale.load_state(extra["loss_scale"])
        if self.placement and "expert_placement" in extra:
            self.placement.load_state(extra["expert_placement"])
