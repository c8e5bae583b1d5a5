"""megatron-core's optimizer, plain or distributed over the data ranks, with our learning rate, our clipping and whole moments.

Imports megatron-core, so it is imported when an engine is built.
"""

import torch
import torch.distributed as dist
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer_config import ParamKey
from torch import Tensor, nn

from llmtrain.config.train import OptimConfig

NOT_DECAYED = "no_decay_here"
"""Attribute of a parameter that has no weight decay."""


class Optimizer:
    """AdamW over the parameters of wrapped models; `sharded` leaves each data rank a part of the moments."""

    def __init__(self, wrapped: list[nn.Module], cfg: OptimConfig, *, sharded: bool, dtype: torch.dtype):
        self.cfg = cfg
        options = OptimizerConfig(
            optimizer="adam",
            lr=cfg.lr,
            weight_decay=cfg.weight_decay,
            adam_beta1=cfg.betas[0],
            adam_beta2=cfg.betas[1],
            adam_eps=cfg.eps,
            clip_grad=0.0,  # `clip` does it
            bf16=dtype == torch.bfloat16,
            params_dtype=dtype,
            use_distributed_optimizer=sharded,
        )
        overrides = {ParamKey(attr=NOT_DECAYED): {"wd_mult": 0.0}}
        self.inner = get_megatron_optimizer(options, wrapped, config_overrides=overrides, use_gloo_process_groups=False)
        self.parts = [part for part in getattr(self.inner, "chained_optimizers", [self.inner]) if not part.is_stub_optimizer]
        self._parameters: dict[Tensor, tuple] = {}
        for part in self.parts:
            for main, model in self._pairs(part):
                self._parameters[model] = part, main
            for group in part.optimizer.param_groups:
                for main in group["params"]:
                    part.optimizer.state[main] = {
                        "step": torch.zeros((), dtype=torch.float32),
                        "exp_avg": torch.zeros_like(main, requires_grad=False),
                        "exp_avg_sq": torch.zeros_like(main, requires_grad=False),
                    }

    @staticmethod
    def _pairs(part) -> list[tuple[Tensor, Tensor]]:
        """(parameter of the optimizer, parameter of the model) of those that this rank updates, or updates a piece of."""
        mains = [main for group in part.optimizer.param_groups for main in group["params"]]
        if isinstance(part, DistributedOptimizer):
            return [
                (part.optimizer.param_groups[group]["params"][order], model)
                for model, (group, order) in part.model_param_group_index_map.items()
            ]
        owners = {id(getattr(model, "main_param", model)): model for groups in _model_groups(part) for model in groups}
        return [(main, owners[id(main)]) for main in mains]

    # --- a step -------------------------------------------------------------------------------------------------------------------

    def grad_norm(self) -> float:
        """Global 2-norm of the gradients, which then stand where the optimizer looks for them."""
        self.inner.prepare_grads()
        return float(self.inner.get_grad_norm())

    @torch.no_grad()
    def clip(self, factor: float) -> None:
        """Multiply the gradients by `factor`."""
        for part in self.parts:
            for group in part.optimizer.param_groups:
                for main in group["params"]:
                    if main.grad is not None:
                        main.grad.mul_(factor)

    def step(self, *, lr: float) -> None:
        """Update the parameters by the gradients that `grad_norm` left ready."""
        for part in self.parts:
            for group in part.optimizer.param_groups:
                group["lr"], group["weight_decay"] = lr, self.cfg.weight_decay * group.get("wd_mult", 1.0)
        self.inner.step_with_ready_grads()

    def zero_grad(self) -> None:
        """Drop the gradients."""
        self.inner.zero_grad()

    def set_steps(self, steps: int) -> None:
        """The number of steps that the moments have seen."""
        for part in self.parts:
            for state in part.optimizer.state.values():
                state["step"].fill_(steps)

    # --- whole tensors ------------------------------------------------------------------------------------------------------------

    def whole(self, parameter: Tensor, kind: str) -> Tensor:
        """A copy of the parameter's weight or moment, put together from the data ranks' pieces: by all ranks that hold the parameter."""
        if not parameter.requires_grad:
            return parameter.detach().clone()
        part, main = self._parameters.get(parameter, (self._owner(parameter), None))
        if not isinstance(part, DistributedOptimizer):
            return self._of(part, main, kind).detach().clone().view(parameter.shape)
        piece = None if main is None else self._of(part, main, kind)
        return self._gathered(parameter, part, piece)

    def set_whole(self, parameter: Tensor, kind: str, tensor: Tensor) -> None:
        """Copy `tensor` into the parameter's weight or moment, or this rank's piece of it."""
        if kind == "weight":
            parameter.data.copy_(tensor)
        if parameter.requires_grad and parameter in self._parameters:
            part, main = self._parameters[parameter]
            flat = tensor.reshape(-1)[self._range(part, parameter)] if isinstance(part, DistributedOptimizer) else tensor
            self._of(part, main, kind).copy_(flat.view_as(main))

    def gradient(self, parameter: Tensor) -> Tensor:
        """A copy of the parameter's whole gradient, summed over the ranks, before clipping."""
        part, _ = self._parameters.get(parameter, (self._owner(parameter), None))
        if not isinstance(part, DistributedOptimizer):
            return parameter.main_grad.detach().clone()
        piece = parameter.main_grad.reshape(-1)[self._range(part, parameter)] if parameter in self._parameters else None
        return self._gathered(parameter, part, piece)

    def _owner(self, parameter: Tensor):
        expert = not getattr(parameter, "allreduce", True)
        return self.parts[-1] if expert else self.parts[0]

    @staticmethod
    def _of(part, main: Tensor, kind: str) -> Tensor:
        return main if kind == "weight" else part.optimizer.state[main][kind]

    @staticmethod
    def _range(part: DistributedOptimizer, parameter: Tensor) -> slice:
        where = part._get_model_param_range_map(parameter)["param"]
        return slice(where.start, where.end)

    def _gathered(self, parameter: Tensor, part: DistributedOptimizer, piece: Tensor | None) -> Tensor:
        """Pieces are added up as whole numbers, which changes no bit of them."""
        flat = torch.zeros(parameter.numel(), dtype=torch.float32, device=parameter.device)
        if piece is not None:
            flat[self._range(part, parameter)] = piece.reshape(-1).float()
        dist.all_reduce(flat.view(torch.int32), group=part.data_parallel_group)
        return flat.view(parameter.shape)


def _model_groups(part) -> list[list[Tensor]]:
    """Parameters of the model that an optimizer without sharding updates."""
    if hasattr(part, "float16_groups"):
        return [*part.float16_groups, *part.fp32_from_fp32_groups]
    return [group["params"] for group in part.optimizer.param_groups]
