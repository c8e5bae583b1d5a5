"""The native engine: PyTorch's own pieces. Today the data-parallel axes, by FSDP2."""

import fnmatch
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import nn

from llmtrain.compat import compile_seconds
from llmtrain.config.run import RunConfig
from llmtrain.data.batch import Batch
from llmtrain.device.base import Device
from llmtrain.device.dtypes import torch_dtype
from llmtrain.engine.base import Capabilities, StepResult, register_engine
from llmtrain.engine.loss_scale import LossScale
from llmtrain.errors import UserError
from llmtrain.model import family
from llmtrain.model.init import initialise, measure_branch_std, set_post_norm_gamma
from llmtrain.ops import Mask, Ops
from llmtrain.parallel.cast import apply_cast
from llmtrain.parallel.compile import apply_compile, decide, eager
from llmtrain.parallel.fsdp import apply_fsdp, local_tensor, release_gathered, set_gradient_sync
from llmtrain.parallel.mesh import Mesh
from llmtrain.parallel.recompute import apply_recompute


@register_engine("native")
def build(cfg: RunConfig, *, objective: Callable[[dict], torch.Tensor], mesh: Mesh, device: Device, ops: Ops) -> "NativeEngine":
    """Build the model on meta, apply the mesh, materialise, initialise. Raises UserError for what the engine cannot run."""
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
    with torch.device("meta"):
        model = family.build(cfg.model, ops, cfg.train.loss_chunk).to(torch_dtype(precision.params))
    names = [name for name, _ in model.named_parameters()]
    compiled = decide(cfg, kind=device.kind, ranks=mesh.world).on
    if compiled:
        apply_compile(model)
    if mesh.world == 1 and precision.compute != precision.params:
        apply_cast(model, torch_dtype(precision.compute))
    apply_recompute(model, cfg.train.recompute)
    if mesh.world > 1:
        apply_fsdp(model, mesh=mesh.fsdp_mesh(), precision=precision, reshard_after_forward=cfg.parallel.reshard_after_forward)
    model.to_empty(device=device.torch_device)
    if cfg.model.pretrained is None:  # else the weights are read before the first step
        initialise(model, cfg.model, cfg.seed)
    assert names == [name for name, _ in model.named_parameters()], "wrapping must not change canonical names"
    return NativeEngine(cfg, model=model, objective=objective, mesh=mesh, device=device, ops=ops, compiled=compiled)


class NativeEngine:
    """Forward and backward over micro-batches, AdamW, and the canonical state of both."""

    def __init__(
        self, cfg: RunConfig, *, model: nn.Module, objective: Callable, mesh: Mesh, device: Device, ops: Ops, compiled: bool = False
    ):
        self.cfg, self.model, self.objective, self.mesh, self.device = cfg, model, objective, mesh, device
        self.parameters = dict(model.named_parameters())
        self.optimizer = self._build_optimizer(ops)
        self.steps_taken = 0
        self.loss_scale = LossScale(cfg.precision.loss_scale) if cfg.precision.compute == "fp16" else None
        self._norm: float | None = None
        self._eager = eager if compiled else nullcontext  # the context brings the compiler's import with it

    def _build_optimizer(self, ops: Ops) -> torch.optim.Optimizer:
        optim = self.cfg.optim
        decayed = {name: not any(fnmatch.fnmatch(name, pattern) for pattern in optim.no_decay) for name in self.parameters}
        groups = [
            {"params": [self.parameters[name] for name in decayed if decayed[name] is decay], "weight_decay": weight_decay}
            for decay, weight_decay in ((True, optim.weight_decay), (False, 0.0))
        ]
        optimizer = ops.adamw([g for g in groups if g["params"]], lr=optim.lr, betas=optim.betas, eps=optim.eps)
        # The moments exist from the start, so that a state can be loaded before the first step.
        for parameter in self.parameters.values():
            step = torch.zeros((), dtype=torch.float32, device=self.device.torch_device)
            optimizer.state[parameter] = {
                "step": step,
                "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            }
        return optimizer

    def capabilities(self) -> Capabilities:
        """Data-parallel axes, every format; steps can be discarded."""
        return Capabilities(discard=True, axes=("dp_replicate", "dp_shard"), dtypes=("fp64", "fp32", "bf16", "fp16"))

    def _forward(self, batch: Batch) -> dict[str, torch.Tensor]:
        batch = batch.to(self.device.torch_device)
        return self.model(batch.tokens, positions=batch.positions, mask=Mask(documents=batch.documents), targets=batch.targets)

    def _count_targets(self, micro_batches: Sequence[Batch]) -> int:
        total = int(self.mesh.sum(sum(batch.target_count for batch in micro_batches))[0])
        if total == 0:
            raise UserError("a step holds no target token: every document in it is one token long; check the data or data.document_mask")
        return total

    def forward_backward(self, micro_batches: Sequence[Batch]) -> StepResult:
        """Gradients of the mean over all target tokens of the step; see Engine."""
        total, compiling = self._count_targets(micro_batches), compile_seconds()
        scale = (self.loss_scale.value if self.loss_scale else 1.0) / total
        losses = []
        for index, batch in enumerate(micro_batches):
            set_gradient_sync(self.model, index == len(micro_batches) - 1)
            loss = self.objective(self._forward(batch))
            (loss * scale).backward()
            losses.append(loss.detach())
        self._norm = None
        compiling = compile_seconds() - compiling
        return self._result(micro_batches, losses, total, {"compile_seconds": compiling} if compiling else {})

    def _result(self, micro_batches: Sequence[Batch], losses: list[torch.Tensor], total: int, metrics: dict | None = None) -> StepResult:
        values = torch.stack(losses).double().tolist() if self.device.kind == "cpu" else torch.stack(losses).tolist()
        loss_sum = self.mesh.sum(math.fsum(values))[0]
        bad: tuple[int, ...] = ()
        if not math.isfinite(loss_sum):
            mine = [s for batch, value in zip(micro_batches, values) if not math.isfinite(value) for s in batch.samples]
            bad = tuple(sorted(sample for part in self.mesh.gather(mine) for sample in part))
        return StepResult(loss_sum=loss_sum, target_count=total, metrics=metrics or {}, bad_samples=bad)

    def _gradients(self) -> list[torch.Tensor]:
        return [local_tensor(p.grad) for p in self.parameters.values() if p.grad is not None]

    @torch.no_grad()
    def grad_norm(self) -> float:
        """Global 2-norm of the (unscaled) gradients; computed once per step."""
        if self._norm is None:
            gradients = self._gradients()
            if self.loss_scale:
                for gradient in gradients:
                    gradient.mul_(1.0 / self.loss_scale.value)
            square = torch.nn.utils.get_total_norm(gradients).item() ** 2
            # Shards of one replica add up; replicas hold equal gradients.
            self._norm = math.sqrt(self.mesh.sum(square)[0] / self.mesh.shape.dp_replicate)
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
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.steps_taken += 1
        self._drop(finite=True)

    def discard(self) -> None:
        """Drop the gradients; an fp16 overflow also shrinks the loss scale."""
        self._drop(finite=not self.overflowed())

    def _drop(self, *, finite: bool) -> None:
        if self.loss_scale:
            self.loss_scale.update(finite=finite)
        self.optimizer.zero_grad(set_to_none=True)
        self._norm = None

    @torch.no_grad()
    def evaluate(self, micro_batches: Sequence[Batch]) -> StepResult:
        """The loss without gradients. Every rank brings the same number of micro-batches."""
        total = self._count_targets(micro_batches)
        with self._eager():
            losses = [self._forward(batch)["ce_sum"] for batch in micro_batches]
        return self._result(micro_batches, losses, total)

    @torch.no_grad()
    def logits(self, tokens: torch.Tensor, *, positions: torch.Tensor | None = None) -> torch.Tensor:
        """Logits [B, S, V] of tokens [B, S]; every rank gives the same tokens."""
        tokens = tokens.to(self.device.torch_device)
        with self._eager():
            return self.model(tokens, positions=positions, mask=Mask())["logits"]

    def begin_phase(self, *, rope_base: float) -> None:
        """Set the phase's RoPE base."""
        if self.cfg.model.position.kind == "rope":
            self.model.set_rope_base(rope_base)

    @torch.no_grad()
    def calibrate(self, batch: Batch) -> dict[str, float]:
        """Set post-norm gammas from the branches' output std on `batch` (the same on every rank), where norm.c_* is `auto`."""
        norm = self.cfg.model.norm
        if norm.placement != "depth_scaled_sandwich" or "auto" not in (norm.c_attention, norm.c_ffn):
            return {}
        with self._eager():
            attention, ffn = measure_branch_std(self.model, lambda: self._forward(batch))
        release_gathered(self.model)
        c_attention = attention if norm.c_attention == "auto" else norm.c_attention
        c_ffn = ffn if norm.c_ffn == "auto" else norm.c_ffn
        set_post_norm_gamma(self.model, c_attention, c_ffn)
        return {"c_attention": c_attention, "c_ffn": c_ffn}

    def state(self) -> dict[str, torch.Tensor]:
        """Live parameters and moments by canonical name, and the number of steps taken."""
        state = {"step": torch.tensor(self.steps_taken, dtype=torch.int64)}
        for name, parameter in self.parameters.items():
            moments = self.optimizer.state[parameter]
            state[f"{name}.weight"] = parameter.detach()
            state[f"{name}.exp_avg"] = moments["exp_avg"]
            state[f"{name}.exp_avg_sq"] = moments["exp_avg_sq"]
        return state

    @torch.no_grad()
    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """Copy `state` into the parameters and moments; tensors of state() filled in place are already there."""
        self.steps_taken = int(state["step"])
        for key, mine in self.state().items():
            if key != "step" and local_tensor(mine).data_ptr() != local_tensor(state[key]).data_ptr():
                mine.copy_(state[key])
        for parameter in self.parameters.values():
            self.optimizer.state[parameter]["step"].fill_(self.steps_taken)

    def extra_state(self) -> dict:
        """The loss scale, if there is one."""
        return {"loss_scale": self.loss_scale.state()} if self.loss_scale else {}

    def load_extra_state(self, extra: dict) -> None:
        """Take over the loss scale."""
        if self.loss_scale and "loss_scale" in extra:
            self.loss_scale.load_state(extra["loss_scale"])
