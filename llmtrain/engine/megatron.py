"""The engine megatron: megatron-core's layers, schedules and optimizer behind our configuration, state and loop (docs/megatron.md).

megatron-core is imported when an engine is built.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from llmtrain.config.run import RunConfig
from llmtrain.data.batch import NO_TARGET, Batch
from llmtrain.device.base import Device
from llmtrain.device.dtypes import torch_dtype
from llmtrain.engine.base import Capabilities, StepResult, register_engine
from llmtrain.engine.local_optimizer import is_decayed
from llmtrain.engine.megatron_check import check
from llmtrain.engine.megatron_shared import Shared
from llmtrain.engine.micro_batch import MicroBatch, prepare
from llmtrain.errors import UserError
from llmtrain.model.init import initialise
from llmtrain.model.rope import Rope
from llmtrain.ops import Ops
from llmtrain.parallel.cp import ContextParallel
from llmtrain.parallel.mesh import Mesh

AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp", "ep")


@register_engine("megatron", check=check)
def build(cfg: RunConfig, *, objective: Callable[[dict], torch.Tensor], mesh: Mesh, device: Device, ops: Ops) -> "MegatronEngine":
    """Build this rank's stages of the model and fill them. Raises UserError for weight decay that differs within one of its parameters."""
    engine = MegatronEngine(cfg, objective=objective, mesh=mesh, device=device, ops=ops)
    if cfg.model.pretrained is None:  # else the weights are read before the first step
        engine.initialise()
    return engine


class MegatronEngine:
    """Forward and backward by megatron-core's schedules, AdamW by its optimizer, canonical state by the weight map."""

    def __init__(self, cfg: RunConfig, *, objective: Callable, mesh: Mesh, device: Device, ops: Ops):
        from llmtrain.engine.megatron_optimizer import NOT_DECAYED, Optimizer
        from llmtrain.engine.megatron_stages import MegatronStages, start_world
        from llmtrain.engine.megatron_state import Layout, State
        from llmtrain.engine.megatron_usage import build_usage

        self.cfg, self.objective, self.mesh, self.device = cfg, objective, mesh, device
        start_world(cfg, mesh)
        shape, position = mesh.shape, cfg.model.position
        self.cp = ContextParallel(mesh.group("cp"), cfg.parallel.cp_kind, ops=ops, multiple=shape.tp) if shape.cp > 1 else None
        rope = Rope(position, cfg.model.rope_dim) if position.kind == "rope" else None
        self.dtype = torch_dtype(cfg.precision.compute)
        shared = Shared(cfg.model, ops, self.dtype, self.cp, rope)
        sharded = shape.dp_shard > 1
        self.stages = MegatronStages(cfg, shared, mesh, sharded=sharded)
        self.layout = Layout(cfg.model, self.stages.models, mesh)
        self.layout.mark()
        self.usage = build_usage(self.stages.models, cfg.model, mesh)
        for held in self.layout.held.values():
            decayed = {is_decayed(part.name, cfg.optim) for part in held.entry.parts}
            if len(decayed) > 1:
                names = ", ".join(part.name for part in held.entry.parts)
                raise UserError(f"engine megatron: optim.no_decay tells {names} apart, which are one parameter there")
            setattr(held.parameter, NOT_DECAYED, not decayed.pop())
        self.stages.wrap()
        self.optimizer = Optimizer(self.stages.wrapped, cfg.optim, sharded=sharded, dtype=self.dtype)
        self._state = State(self.layout, self.optimizer)
        self.steps_taken = 0
        self._norm: float | None = None
        self._moved: list[torch.Tensor] = []

    def initialise(self) -> None:
        """Draw the weights, the same as under any other engine and mesh."""
        state = self._state.get()
        initialise(_Parameters(state), self.cfg.model, self.cfg.seed)
        self._state.put(state)

    def capabilities(self) -> Capabilities:
        """Every axis; steps can be discarded, since gradients are seen before its optimizer takes them."""
        return Capabilities(discard=True, axes=AXES, dtypes=("fp32", "bf16"))

    # --- a step -------------------------------------------------------------------------------------------------------------------

    def forward_backward(self, micro_batches: Sequence[Batch]) -> StepResult:
        """Gradients of the mean over all target tokens of the step; see Engine."""
        total = self._count_targets(micro_batches)
        prepared, before = self._prepared(micro_batches, heads=self.cfg.model.mtp.heads), self._biases()
        if self.usage is not None:
            self.usage.begin_step()
        losses = self.stages.train(prepared, objective=self.objective, scale=1.0 / total)
        self._moved = self._biases()  # megatron-core moves them with the gradients; here that waits for `apply`
        self._set_biases(before)
        self._norm = self.optimizer.grad_norm()
        result = self._result(micro_batches, [loss.item() for loss in losses], total)
        if self.usage is None:
            return result
        return replace(result, metrics=self.usage.metrics(self.mesh.sum(*self.usage.end_step())), expert_counts=self.usage.totals)

    def _biases(self) -> list[torch.Tensor]:
        """Copies of the routers' biases of this rank."""
        return [held.parameter.clone() for held in self.layout.held.values() if not held.parameter.requires_grad]

    def _set_biases(self, values: list[torch.Tensor]) -> None:
        buffers = (held.parameter for held in self.layout.held.values() if not held.parameter.requires_grad)
        for buffer, value in zip(buffers, values):
            buffer.copy_(value)

    def _prepared(self, batches: Sequence[Batch], *, heads: int = 0) -> list[MicroBatch]:
        return [prepare(batch, device=self.device, cp=self.cp, multiple=self.mesh.shape.tp, heads=heads) for batch in batches]

    def _count_targets(self, micro_batches: Sequence[Batch]) -> int:
        # Ranks that differ along pp, cp and tp alone have read the same samples.
        total = int(self.mesh.sum(sum(batch.target_count for batch in micro_batches), axes=("dp_replicate", "dp_shard"))[0])
        if total == 0:
            raise UserError("a step holds no target token: every document in it is one token long; check the data or data.document_mask")
        return total

    def _result(self, micro_batches: Sequence[Batch], values: list[float], total: int) -> StepResult:
        """`values` are this rank's losses by micro-batch, none on ranks without the last stage; ranks of tp all have the same."""
        (loss_sum,) = self.mesh.sum(0.0 if self.mesh.place("tp") else math.fsum(values))
        bad: tuple[int, ...] = ()
        if not math.isfinite(loss_sum):
            mine = [s for batch, value in zip(micro_batches, values) if not math.isfinite(value) for s in batch.samples]
            bad = tuple(sorted({sample for part in self.mesh.gather(mine) for sample in part}))
        return StepResult(loss_sum=loss_sum, target_count=total, bad_samples=bad)

    def grad_norm(self) -> float:
        """Global 2-norm of the gradients, before clipping."""
        if self._norm is None:
            raise RuntimeError("there are no gradients: call forward_backward first")
        return self._norm

    def overflowed(self) -> bool:
        """There is no fp16 here."""
        return False

    def apply(self, *, lr: float) -> None:
        """Clip to optim.max_grad_norm and take an AdamW step at `lr`."""
        norm, limit = self.grad_norm(), self.cfg.optim.max_grad_norm
        if limit is not None and norm > limit:
            self.optimizer.clip(limit / norm)
        self.optimizer.step(lr=lr)
        self._set_biases(self._moved)
        self.steps_taken += 1
        self.discard()

    def discard(self) -> None:
        """Drop the gradients."""
        self.optimizer.zero_grad()
        self._norm = None

    @torch.no_grad()
    def evaluate(self, micro_batches: Sequence[Batch]) -> StepResult:
        """The loss without gradients. Every rank brings the same number of micro-batches."""
        total = self._count_targets(micro_batches)
        values = [value.item() for value in self.stages.infer(self._prepared(micro_batches), output="ce_sum")]
        return self._result(micro_batches, values, total)

    @torch.no_grad()
    def logits(self, tokens: torch.Tensor, *, positions: torch.Tensor | None = None) -> torch.Tensor:
        """Logits [B, S, V] of tokens [B, S]; every rank gives the same tokens."""
        if positions is None:
            positions = torch.arange(tokens.shape[1])[None].expand_as(tokens)
        nothing = torch.full_like(tokens, NO_TARGET)
        (micro,) = self._prepared([Batch(tokens=tokens, targets=nothing, positions=positions, documents=None, samples=())])
        found = self.stages.infer([micro], output="logits")
        length = tokens.shape[1]
        cut = [self.cp.join(part, micro.mask.documents, length) if self.cp is not None else part[:, :length] for part in found]
        shape = (*tokens.shape, self.cfg.model.vocab_size)
        return self.stages.share_logits(cut, shape, self.dtype, self.device.torch_device)

    def begin_phase(self, *, rope_base: float) -> None:
        """Set the phase's RoPE base."""
        if self.stages.shared.rope is not None:
            self.stages.shared.rope.base = rope_base

    def calibrate(self, batch: Batch) -> dict[str, float]:
        """Nothing is `auto` here: it is refused when the engine is built."""
        return {}

    # --- state --------------------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, torch.Tensor]:
        """Weights and moments of this rank's stages by canonical name, and the number of steps taken. They are copies: several of ours are
        one tensor there, in another order."""
        return {"step": torch.tensor(self.steps_taken, dtype=torch.int64)} | self._state.get()

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """Take over a canonical state."""
        self.steps_taken = int(state["step"])
        self._state.put(state)
        self.optimizer.set_steps(self.steps_taken)

    def extra_state(self) -> dict:
        """Nothing beside the tensors."""
        return {}

    def load_extra_state(self, extra: dict) -> None:
        """Nothing to take over."""

    def gradients(self) -> dict[str, torch.Tensor]:
        """The gradients that `apply` would take, by canonical name, before clipping; for comparisons."""
        found = {name: self.optimizer.gradient(held.parameter) for name, held in self.layout.held.items() if held.parameter.requires_grad}
        return self.layout.canonical(found)


class _Parameters:
    """Canonical weights as `initialise` looks at a model's."""

    def __init__(self, state: dict[str, torch.Tensor]):
        weights = {key.removesuffix(".weight"): tensor for key, tensor in state.items() if key.endswith(".weight")}
        self._buffers = {name: tensor for name, tensor in weights.items() if name.endswith("router.bias")}
        self._parameters = {name: tensor for name, tensor in weights.items() if name not in self._buffers}

    def named_parameters(self):
        """(canonical name, tensor)."""
        return self._parameters.items()

    def buffers(self):
        """Biases of routers."""
        return self._buffers.values()
