"""An optimizer over each rank's own parts of the parameters."""

import fnmatch

import torch
from torch import Tensor, nn

from llmtrain.config.train import OptimConfig
from llmtrain.ops import Ops
from llmtrain.parallel.fsdp import local_tensor


class LocalOptimizer:
    """AdamW on plain local tensors: its update is element by element, so parameters of different meshes need no special case.

    `moments[name]` are this rank's (exp_avg, exp_avg_sq); they exist from the start, so that a state can be loaded before the first step.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], cfg: OptimConfig, *, ops: Ops):
        self.parameters = parameters
        self._mine = {name: nn.Parameter(local_tensor(p).detach()) for name, p in parameters.items()}
        decayed = {name: is_decayed(name, cfg) for name in parameters}
        groups = [
            {"params": [self._mine[name] for name in decayed if decayed[name] is decay], "weight_decay": weight_decay}
            for decay, weight_decay in ((True, cfg.weight_decay), (False, 0.0))
        ]
        self._adamw = ops.adamw([g for g in groups if g["params"]], lr=cfg.lr, betas=cfg.betas, eps=cfg.eps)
        for mine in self._mine.values():
            self._adamw.state[mine] = {
                "step": torch.zeros((), dtype=torch.float32, device=mine.device),
                "exp_avg": torch.zeros_like(mine, requires_grad=False),
                "exp_avg_sq": torch.zeros_like(mine, requires_grad=False),
            }

    @property
    def moments(self) -> dict[str, tuple[Tensor, Tensor]]:
        """The live moments by parameter name."""
        states = {name: self._adamw.state[mine] for name, mine in self._mine.items()}
        return {name: (state["exp_avg"], state["exp_avg_sq"]) for name, state in states.items()}

    @torch.no_grad()
    def step(self, *, lr: float) -> None:
        """Update every parameter that has a gradient."""
        for name, mine in self._mine.items():
            parameter = self.parameters[name]
            # FSDP2 may give a parameter other memory when it first runs.
            mine.data = local_tensor(parameter)
            mine.grad = None if parameter.grad is None else local_tensor(parameter.grad)
        for group in self._adamw.param_groups:
            group["lr"] = lr
        self._adamw.step()

    def zero_grad(self) -> None:
        """Drop the gradients."""
        for name, mine in self._mine.items():
            mine.grad = self.parameters[name].grad = None

    def set_steps(self, steps: int) -> None:
        """The number of steps that the moments have seen."""
        for mine in self._mine.values():
            self._adamw.state[mine]["step"].fill_(steps)


def is_decayed(name: str, cfg: OptimConfig) -> bool:
    """Whether the parameter of this canonical name has weight decay."""
    return not any(fnmatch.fnmatch(name, pattern) for pattern in cfg.no_decay)
