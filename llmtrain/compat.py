"""The one place for names of torch that are private or not in every supported version."""

from typing import Any

from torch import nn


def fsdp_sum_gradients(module: nn.Module) -> None:
    """Make every FSDP2 module in `module` reduce its gradients by a plain sum over ranks, without dividing.

    The loss is divided by the target count of the whole step beforehand, so an average over ranks would be wrong. Plain SUM also keeps
    back ends that lack PreMulSum (gloo, hccl) on their ordinary path. Raises RuntimeError when this torch cannot do it.
    """
    from torch.distributed.fsdp import FSDPModule

    for part in module.modules():
        if isinstance(part, FSDPModule):
            _call(part, ("set_gradient_divide_factor", "set_reduce_scatter_divide_factor"), 1.0)
            _call(part, ("set_force_sum_reduction_for_comms",), True, required=False)


def record_memory_history(module: Any, *, entries: int | None) -> None:
    """Record up to `entries` allocations with stacks on torch.cuda or torch.npu (`module`), or stop recording for None."""
    if entries is None:
        module.memory._record_memory_history(enabled=None)
    else:
        module.memory._record_memory_history(max_entries=entries)


def dump_memory_snapshot(module: Any, path: str) -> None:
    """Write what `record_memory_history` collected to a pickle that https://pytorch.org/memory_viz reads."""
    module.memory._dump_snapshot(path)


def swapped_parameters(module: nn.Module, tensors: dict[str, Any]) -> Any:
    """Context in which `module` computes with `tensors` in the place of its parameters of these names.

    torch.func.functional_call does the same but calls the module, whose forward may be the caller.
    """
    from torch.nn.utils.stateless import _reparametrize_module

    return _reparametrize_module(module, tensors)


def load_symmetric_memory() -> bool:
    """Whether this torch has the operators torch.ops.symm_mem.fused_*, which are registered now."""
    import torch

    try:
        import torch.distributed._symmetric_memory  # noqa: F401
    except ImportError:
        return False
    return hasattr(torch.ops.symm_mem, "fused_all_gather_matmul") and hasattr(torch.ops.symm_mem, "fused_matmul_reduce_scatter")


def flatten_mesh(mesh: Any, name: str) -> Any:
    """The DeviceMesh `mesh` as one axis of that name, with its groups made now."""
    return mesh._flatten(name)


def concatenate_meshes(*meshes: Any) -> Any:
    """The DeviceMesh whose axes are those of `meshes`, all parts of one mesh; makes no group. FSDP2 itself does this."""
    from torch.distributed.device_mesh import DeviceMesh

    return DeviceMesh._concatenate(list(meshes))


def reduce_fsdp_gradients(module: nn.Module) -> None:
    """Reduce the gradients that the FSDP2 module `module` has accumulated over several backward passes without a reduction, and reshard it.

    What FSDP2 does by itself in a backward pass with `set_is_last_backward(True)`, for schedules that compute gradients of weights apart.
    """
    from torch.distributed.fsdp import fully_shard

    module.set_is_last_backward(True)
    module.set_reshard_after_backward(True)
    module.set_requires_gradient_sync(True)
    state = fully_shard.state(module)
    for part in state._state_ctx.all_states:
        groups = part._fsdp_param_groups if hasattr(part, "_fsdp_param_groups") else filter(None, [part._fsdp_param_group])
        for group in groups:
            group.post_backward()
    state._root_post_backward_final_callback()


def split_backward() -> tuple[Any, Any]:
    """(gradients for inputs, then gradients for weights) of a stage: torch.distributed.pipelining's two halves of a backward pass."""
    from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight

    return stage_backward_input, stage_backward_weight


def compile_seconds() -> float:
    """Seconds that this process has spent in torch.compile so far; 0 where this torch does not tell."""
    import sys

    utils = sys.modules.get("torch._dynamo.utils")
    times = getattr(utils, "compilation_time_metrics", {})
    return sum(sum(times.get(key, ())) for key in ("_compile.compile_inner", "backward._backward_impl"))


def _call(target: Any, names: tuple[str, ...], value: Any, *, required: bool = True) -> None:
    """Call the first of `names` that `target` has; torch renamed some of them between versions."""
    for name in names:
        if hasattr(target, name):
            getattr(target, name)(value)
            return
    if required:
        import torch

        raise RuntimeError(f"torch {torch.__version__} has none of FSDPModule.{', '.join(names)}; use torch>=2.9")
