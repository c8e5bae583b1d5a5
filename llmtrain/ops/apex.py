"""RMSNorm and AdamW of NVIDIA's apex, where it is built. Not run on hardware: the calls are held to its signatures and tested on stand-ins.
So `auto` takes neither. The package `apex` of the package index is another one, and is refused as such."""

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llmtrain.ops.adamw import Groups
from llmtrain.ops.fast_attention import UNMEASURED
from llmtrain.ops.registry import register
from llmtrain.packages import wrong_apex


def _needs(extension: str) -> Callable[[], str | None]:
    def probe() -> str | None:
        if importlib.util.find_spec("apex") is None:
            return "needs NVIDIA's apex, built from its source repository; the package index has another of that name"
        if wrong := wrong_apex():
            return wrong
        missing = importlib.util.find_spec(extension) is None
        return f"needs apex built with its CUDA extensions: there is no {extension}" if missing else None

    return probe


@register(
    "rms_norm",
    "apex",
    devices=("cuda",),
    dtypes=(torch.float32, torch.bfloat16, torch.float16),
    speed=UNMEASURED,
    probe=_needs("fused_layer_norm_cuda"),
)
def rms_norm_apex(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As `rms_norm_reference`. The weight is taken in x's dtype, as its kernel needs."""
    function = importlib.import_module("apex.normalization.fused_layer_norm").FusedRMSNormAffineFunction
    memory_efficient = False
    return function.apply(x, weight.to(x.dtype), weight.shape, eps, memory_efficient)


@register("adamw", "apex", devices=("cuda",), dtypes=(torch.float32,), speed=UNMEASURED, probe=_needs("amp_C"))
def adamw_apex(groups: Groups, *, lr: float, betas: tuple[float, float], eps: float) -> torch.optim.Optimizer:
    """apex.optimizers.FusedAdam. It corrects the bias of all parameters of a group by one number of steps, the largest: torch's AdamW has
    one for each, which differ where a parameter had no gradient at some steps."""
    fused = importlib.import_module("apex.optimizers").FusedAdam
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
    if "exp_avg" not in state:
        state.setdefault("step", torch.zeros((), dtype=torch.float32))
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
    return state
