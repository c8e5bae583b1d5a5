"""FusedAdam as NVIDIA wrote it for apex and Transformer Engine, in the place of torch's AdamW."""

from typing import Any

import torch
from torch import Tensor

from llmtrain.ops.adamw import Groups


def adamw_of(fused: Any, groups: Groups, *, lr: float, betas: tuple[float, float], eps: float) -> torch.optim.Optimizer:
    """An optimizer of the class `fused`. It corrects the bias of all parameters of a group by one number of steps, the largest: torch's
    AdamW has one for each, which differ where a parameter had no gradient at some steps."""
    adamw = fused(groups, lr=lr, bias_correction=True, betas=betas, eps=eps, adam_w_mode=True, weight_decay=0.0)
    adamw.register_step_pre_hook(_before)
    adamw.register_step_post_hook(_after)
    return adamw


def _before(adamw: torch.optim.Optimizer, *_: Any) -> None:
    """Give FusedAdam the number of steps, which it counts in the group, from where torch's AdamW has it and a resumed run sets it: the
    state of each parameter. It is moved to one tensor on the CPU for a group, so that reading it waits for no device."""
    for group in adamw.param_groups:
        states = [_state(adamw, parameter) for parameter in group["params"] if parameter.grad is not None]
        if not states:
            continue
        counts = {id(state["step"]): state["step"] for state in states}
        taken = max(counts.values(), key=float).cpu()
        for state in states:
            state["step"] = taken
        group["step"] = int(taken)


def _after(adamw: torch.optim.Optimizer, *_: Any) -> None:
    for group in adamw.param_groups:
        stepped = next((parameter for parameter in group["params"] if parameter.grad is not None), None)
        if stepped is not None:
            adamw.state[stepped]["step"] += 1


def _state(adamw: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """What torch's AdamW keeps of a parameter, made if it is not there: FusedAdam makes its moments only where there is no state."""
    state = adamw.state[parameter]
    state.setdefault("step", torch.zeros((), dtype=torch.float32))
    if "exp_avg" not in state:
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
    return state
