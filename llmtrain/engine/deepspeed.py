"""The engine deepspeed: the same model, losses and AdamW, with DeepSpeed's ZeRO between the data-parallel ranks (docs/engines.md)."""

import atexit
import contextlib
import io
import logging
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llmtrain.config.run import RunConfig
from llmtrain.device.base import Device
from llmtrain.engine.base import Capabilities, register_engine
from llmtrain.engine.deepspeed_build import prepare
from llmtrain.engine.deepspeed_config import AXES, DTYPES, check, deepspeed_config
from llmtrain.engine.deepspeed_files import in_order, own_folder
from llmtrain.engine.deepspeed_layout import Replicated, layout_of
from llmtrain.engine.deepspeed_state import CanonicalState
from llmtrain.engine.local_optimizer import is_decayed
from llmtrain.engine.native import NativeEngine
from llmtrain.engine.stages import Stages
from llmtrain.model import family
from llmtrain.model.init import initialise
from llmtrain.ops import Ops
from llmtrain.parallel.fsdp import local_tensor
from llmtrain.parallel.gradients import square_sum
from llmtrain.parallel.hang.where import watch_layers
from llmtrain.parallel.mesh import Mesh
from llmtrain.parallel.placement import canonical
from llmtrain.parallel.recompute import apply_recompute

logger = logging.getLogger(__name__)


@register_engine("deepspeed", check=check)
def build(cfg: RunConfig, *, objective: Callable[[dict], Tensor], mesh: Mesh, device: Device, ops: Ops) -> "DeepSpeedEngine":
    """Build the whole model on every rank and give it to DeepSpeed. Raises UserError for what the engine cannot run."""
    prepare(mesh, device, swaps=cfg.engine.swaps)
    with torch.device("meta"):
        model = family.build(cfg.model, ops, cfg.train.loss_chunk).to(torch.float32)
    apply_recompute(model, cfg.train.recompute)
    watch_layers(model)
    model.to_empty(device=device.torch_device)
    if cfg.model.pretrained is None:  # else the weights are read before the first step
        initialise(model, cfg.model, cfg.seed)
    stages = ZeroStages(cfg, {0: model}, [set()], mesh=mesh, device=device, cp=None, plan=None, compiled=False)
    return DeepSpeedEngine(cfg, stages=stages, objective=objective, mesh=mesh, device=device, ops=ops)


class ZeroStages(Stages):
    """A whole model around which DeepSpeed is wrapped: `called[0]`."""

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """As of Stages; DeepSpeed reduces gradients, in parts already before the last."""
        wrapped = self.called[0]
        wrapped.set_gradient_accumulation_boundary(last)
        wrapped.backward(loss, scale_wrt_gas=False)


class ZeroOptimizer:
    """What DeepSpeed makes of AdamW: it updates this rank's pieces of the parameters, and has gradients to itself."""

    def __init__(self, cfg: RunConfig, model: nn.Module, parameters: dict[str, nn.Parameter], *, ops: Ops):
        self.parameters = parameters
        adamw = _adamw(parameters, cfg, ops=ops)
        sizes = [parameter.numel() for parameter in parameters.values()]
        self.engine = _wrap(model, adamw, deepspeed_config(cfg, sizes=sizes, files=own_folder(cfg)))
        self.layout: Replicated = layout_of(self.engine, parameters)
        self.states: dict[Tensor, dict[str, Tensor]] = adamw.state
        for number, owner in enumerate(self.layout.owners()):
            with self.layout.held(number, changed=True):
                zeros = {kind: torch.zeros_like(owner, requires_grad=False) for kind in ("exp_avg", "exp_avg_sq")}
                self.states[owner] = {"step": torch.zeros((), dtype=torch.float32, device=owner.device)} | zeros

    def step(self, *, lr: float, divisor: float) -> None:
        """Update with the gradients over `divisor`. Raises RuntimeError if DeepSpeed left the step out."""
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        self.layout.step(divisor)
        if not self.engine.was_step_applied():
            raise RuntimeError("DeepSpeed left a step out although its gradients are finite")

    def zero_grad(self) -> None:
        """Drop the gradients."""
        self.layout.drop()

    def set_steps(self, steps: int) -> None:
        """The number of steps that the moments have seen."""
        for owner in self.layout.owners():
            self.states[owner]["step"].fill_(steps)


class DeepSpeedEngine(NativeEngine):
    """The native engine's losses, counts and metrics over one whole model; gradients, updates and state are DeepSpeed's.

    DeepSpeed averages gradients over ranks, which is taken back when it divides them by what we give it. Clipping and the loss scale of
    fp16 are ours: its own clipping adds 1e-6 to the norm, and a step that it gives up by itself would be one that no guard has seen.
    """

    optimizer: ZeroOptimizer

    def __init__(self, cfg: RunConfig, *, stages: Stages, mesh: Mesh, **given: Any):
        names = stages.parameters
        shapes = {name: parameter.shape for name, parameter in names.items()}
        exact = cfg.precision.compute != "fp32"  # DeepSpeed makes fp32 weights from those of 16 bits
        kept = {f"{name}.weight": p.detach().to("cpu", copy=True) for name, p in names.items()} if exact else {}
        super().__init__(cfg, stages=stages, mesh=mesh, **given)
        self.canonical = CanonicalState(self.optimizer.layout, shapes, moments=self.optimizer.states, mesh=mesh)
        if kept:
            self.canonical.write(kept)

    def _optimizer(self, ops: Ops) -> ZeroOptimizer:
        optimizer = ZeroOptimizer(self.cfg, self.stages.parts[0], self.stages.parameters, ops=ops)
        self.stages.called[0] = optimizer.engine
        return optimizer

    def capabilities(self) -> Capabilities:
        """Data parallelism; steps can be discarded."""
        return Capabilities(discard=True, axes=AXES, dtypes=DTYPES)

    # --- a step -------------------------------------------------------------------------------------------------------------------

    @property
    def _scale(self) -> float:
        """What gradients in DeepSpeed's hands are multiplied by."""
        return self._factor() / self.mesh.world

    @torch.no_grad()
    def _square_sum(self) -> float:
        layout = self.optimizer.layout
        holders = layout.holders or self.mesh.world
        sums = (square_sum([gradient.float() for gradient in part], [holders] * len(part)) for part in layout.parts())
        return sum(sums) / self._scale**2

    @torch.no_grad()
    def apply(self, *, lr: float) -> None:
        """Clip to optim.max_grad_norm and take an AdamW step at `lr`."""
        norm, limit = self.grad_norm(), self.cfg.optim.max_grad_norm
        clip = norm / limit if limit is not None and norm > limit else 1.0
        self.optimizer.step(lr=lr, divisor=self._scale * clip)
        if self.stages.usage is not None:
            self.stages.usage.move_biases()
        self.steps_taken += 1
        self._drop(finite=True)

    def _set_post_norms(self, c_attention: float, c_ffn: float) -> None:
        state, root = self.state(), self.cfg.model.layers**0.5
        for ending, value in (("post_attention_norm.weight.weight", c_attention), ("post_ffn_norm.weight.weight", c_ffn)):
            for name in [name for name in state if name.endswith(ending)]:
                local_tensor(state[name]).fill_(value / root)
        self.load_state(state)

    # --- state --------------------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Tensor]:
        """Canonical state: copies of the fp32 weights and moments (see CanonicalState), the model's buffers, and the steps taken."""
        state = {"step": torch.tensor(self.steps_taken, dtype=torch.int64)} | self.canonical.read()
        return state | {f"{name}.weight": canonical(buffer, buffer, self.mesh) for name, buffer in self.stages.parts[0].named_buffers()}

    @torch.no_grad()
    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take over a canonical state."""
        self.steps_taken = int(state["step"])
        self.canonical.write(state)
        for name, buffer in self.stages.parts[0].named_buffers():
            buffer.copy_(local_tensor(state[f"{name}.weight"]))
        self.optimizer.set_steps(self.steps_taken)


def _adamw(parameters: dict[str, nn.Parameter], cfg: RunConfig, *, ops: Ops) -> torch.optim.Optimizer:
    sizes = {name: parameter.numel() for name, parameter in parameters.items()}
    names = in_order(sizes, ranks=dist.get_world_size()) if cfg.engine.swaps else list(parameters)
    decayed = {name: is_decayed(name, cfg.optim) for name in names}
    groups = [
        {"params": [parameters[name] for name in decayed if decayed[name] is decay], "weight_decay": weight_decay}
        for decay, weight_decay in ((True, cfg.optim.weight_decay), (False, 0.0))
    ]
    return ops.adamw([group for group in groups if group["params"]], lr=cfg.optim.lr, betas=cfg.optim.betas, eps=cfg.optim.eps)


_joined: list[Any] = []
"""The world in which DeepSpeed has made its groups."""


def _let_go() -> None:
    from deepspeed.utils import groups

    groups._release_process_group_references()
    _joined.clear()


def _wrap(model: nn.Module, adamw: torch.optim.Optimizer, config: dict[str, Any]) -> Any:
    """The DeepSpeedEngine around `model`. What DeepSpeed prints goes to the log of the rank."""
    import deepspeed
    from deepspeed.utils import groups

    os.environ.setdefault("LOCAL_RANK", "0")
    if _joined != [dist.group.WORLD]:  # DeepSpeed keeps the groups of a world that has ended
        groups._release_process_group_references()
        if not _joined:
            atexit.register(_let_go)
        _joined[:] = [dist.group.WORLD]
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        engine, *_ = deepspeed.initialize(model=model, optimizer=adamw, config=config)
    for line in filter(None, said.getvalue().splitlines()):
        logger.info("deepspeed: %s", line)
    return engine
