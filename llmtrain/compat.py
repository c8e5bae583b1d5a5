"""The one place for names of torch that are private or not in every supported version."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor, nn


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


def watch_fsdp_collectives(module: nn.Module, around: Callable[[str, Any], Any], summed: Callable[[], None] | None = None) -> None:
    """Have the FSDP2 module `module` gather and scatter inside the context `around(op, group)`, and call `summed` behind each of its
    all-reduces (of replicas). Nothing where this torch has no such pieces."""
    try:
        from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllGather, DefaultReduceScatter
    except ImportError:
        return

    class Gather(DefaultAllGather):
        def __call__(self, output_tensor: Any, input_tensor: Any, group: Any, *args: Any, **options: Any) -> Any:
            with around("all_gather", group):
                return super().__call__(output_tensor, input_tensor, group, *args, **options)

    class Scatter(DefaultReduceScatter):
        def __call__(self, output_tensor: Any, input_tensor: Any, group: Any, *args: Any, **options: Any) -> Any:
            with around("reduce_scatter", group):
                return super().__call__(output_tensor, input_tensor, group, *args, **options)

    module.set_custom_all_gather(Gather())
    module.set_custom_reduce_scatter(Scatter())
    if summed is not None:
        module.set_all_reduce_hook(lambda _: summed())


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
        import torch.distributed._symmetric_memory
    except ImportError:
        return False
    return hasattr(torch.ops.symm_mem, "fused_all_gather_matmul") and hasattr(torch.ops.symm_mem, "fused_matmul_reduce_scatter")


def hccl_name(group: Any) -> str:
    """The name by which torch_npu's operators know the process group `group`.

    All its ranks ask together, since its communicator is made if there is none yet.
    """
    import torch
    import torch.distributed as dist

    return group._get_backend(torch.device("npu")).get_hccl_comm_name(dist.get_rank())  # the rank in the world, not in the group


def hccl_options(torch_npu: ModuleType, timeout: timedelta, *, buffer_mb: int | None) -> Any:
    """The options of the loaded `torch_npu` for one HCCL group, for that group alone: the back end keeps and changes the object.

    `timeout` is torch's for its collectives; buffer_mb: HCCL_BUFFSIZE of its communicator, None leaves the environment's.
    """
    options = torch_npu._C._distributed_c10d.ProcessGroupHCCL.Options()
    options._timeout = timeout
    if buffer_mb is not None:
        options.hccl_config = {"hccl_buffer_size": buffer_mb}
    return options


def flatten_mesh(mesh: Any, name: str, options: Any = None) -> Any:
    """The DeviceMesh `mesh` as one axis of that name, with its groups made now, of `options` if given."""
    return mesh._flatten(name, backend_override=options)


def concatenate_meshes(*meshes: Any) -> Any:
    """The DeviceMesh whose axes are those of `meshes`, all parts of one mesh; makes no group. FSDP2 itself does this."""
    from torch.distributed.device_mesh import DeviceMesh

    return DeviceMesh._concatenate(list(meshes))


def take_groups(*meshes: Any) -> set[Any]:
    """The process groups that DeviceMeshes made whole (`init_device_mesh`) hold, of their axes and of what was made of them, taken away.

    DTensor keeps meshes in caches for ever. None before torch 2.11, where meshes hold names of groups.
    """
    registries = [getattr(mesh, "_pg_registry", {}) for mesh in meshes]
    groups = {group for registry in registries for group in registry.values()}
    for registry in registries:
        registry.clear()
    return groups


def is_view(tensor: Tensor) -> bool:
    """Whether autograd takes `tensor` for a view of another one."""
    return tensor._is_view()


def clear_dtensor_caches() -> None:
    """Forget how DTensors of former meshes were sharded: these entries name groups, and a later mesh that is equal would find them."""
    from torch.distributed.tensor import _redistribute, debug

    debug._clear_python_sharding_prop_cache()
    debug._clear_fast_path_sharding_prop_cache()
    _redistribute._gen_transform_infos.cache_clear()


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


def split_backward() -> tuple[Any, Any] | None:
    """(gradients for inputs, then gradients for weights) of a stage: torch.distributed.pipelining's two halves of a backward pass.

    None before torch 2.13, whose second half counts a parameter that is used several times more than once. In 2.10 and 2.11 nodes written
    in Python also die with the graph's output, between the halves.
    """
    import torch

    if torch.torch_version.TorchVersion(torch.__version__) < "2.13":
        return None
    from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight

    return stage_backward_input, stage_backward_weight


def limit_collectives(seconds: float) -> None:
    """Let every process group made so far fail a collective after `seconds`. torch gives groups other than the first limits of their own.

    Back ends that cannot be told (hccl) keep what their options said (`hccl_options`).
    """
    import torch
    from torch.distributed.distributed_c10d import _world

    for group in _world.pg_map:
        for kind in {torch.device(device.type) for device in group._device_types}:
            backend = group._get_backend(kind)
            if hasattr(backend, "_set_default_timeout"):
                backend._set_default_timeout(timedelta(seconds=seconds))


def open_collectives() -> list[dict[str, Any]]:
    """Collectives of this process that were issued and are not complete, oldest first, as torch's flight recorder knows them.

    Each has `op`, `group` (its group_name), `sequence` within the group, and `since` (nanoseconds since 1970). Empty where this torch or
    back end (hccl) keeps no such record. gloo and NCCL have recorders of their own.
    """
    import pickle

    from torch._C import _distributed_c10d as c10d

    found = []
    for name in ("_dump_fr_trace", "_dump_nccl_trace"):
        dump = getattr(c10d, name, None)
        if dump is None:
            continue
        for entry in pickle.loads(dump(includeStackTraces=False)).get("entries", ()):
            if not entry["retired"] and entry["state"] != "completed":
                found.append(
                    {
                        "op": entry["profiling_name"].partition(":")[2] or entry["profiling_name"],
                        "group": entry["process_group"][0],
                        "sequence": entry["p2p_seq_id"] if entry["is_p2p"] else entry["collective_seq_id"],
                        "since": entry["time_created_ns"],
                    }
                )
    return sorted(found, key=lambda entry: entry["since"])


def own_store(timeout: float) -> Any:
    """A connection of one's own to the store that the ranks met at, usable beside the main thread's; `timeout` in seconds.

    None where this torch cannot make one.
    """
    from torch.distributed.distributed_c10d import _get_default_store

    store = _get_default_store()
    if not hasattr(store, "clone"):
        return None
    store = store.clone()
    store.set_timeout(timedelta(seconds=timeout))
    return store


@contextmanager
def fake_world(rank: int, ranks: int) -> Iterator[None]:
    """This process as `rank` of a world of `ranks` that are not there: groups can be made, collectives do nothing.

    Raises RuntimeError where this torch has no such back end.
    """
    import torch
    import torch.distributed as dist

    try:
        from torch.testing._internal.distributed.fake_pg import FakeStore
    except ImportError as error:
        raise RuntimeError(f"torch {torch.__version__} has no fake process group ({error}); use torch>=2.10") from error
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()


def cpu_multiplies_bf16() -> bool:
    """Whether the processor has products of bf16 (AVX512-BF16, AMX or Arm BF16). torch before 2.11 knows of x86 processors only."""
    import torch

    if hasattr(torch.cpu, "get_capabilities"):
        flags = torch.cpu.get_capabilities()
        return any(bool(flags.get(name)) for name in ("avx512_bf16", "amx_bf16", "arm_bf16", "bf16"))
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def cpu_computes_fp16() -> bool:
    """Whether oneDNN computes in fp16 on this processor (AVX512-FP16); DeepSpeed asks the same."""
    import torch

    ask = getattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", None)
    return ask is not None and bool(ask())


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

        raise RuntimeError(f"torch {torch.__version__} has none of FSDPModule.{', '.join(names)}; use torch>=2.10")


def all_gather_rows(out: Any, rows: Any, *, group: Any, async_op: bool = False) -> Any:
    """torch.distributed's all-gather of equal tensors into one, by the name that 2.13 gave it or the one before, of which it warns."""
    import torch.distributed as dist

    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    return gather(out, rows, group=group, async_op=async_op)


def reduce_scatter_rows(out: Any, rows: Any, *, group: Any, async_op: bool = False) -> Any:
    """torch.distributed's reduce-scatter of one tensor in equal parts; see `all_gather_rows`."""
    import torch.distributed as dist

    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    return scatter(out, rows, group=group, async_op=async_op)


def memory_of(tensor: Any) -> Any:
    """A key that stands for the memory of `tensor`: equal for its views, and for nothing made later as long as the key exists.

    Does not keep the memory; `expired()` of it says whether it has been freed.
    """
    from torch.multiprocessing.reductions import StorageWeakRef

    return StorageWeakRef(tensor.untyped_storage())


def dtensor_as_is(local: Any, mesh: Any, placements: Any, *, shape: Any, stride: Any) -> Any:
    """A DTensor over `mesh` whose local part is `local` on whatever device it is; `DTensor.from_local` would copy it to the mesh's kind."""
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

    return DTensor(local, DTensorSpec(mesh, tuple(placements), tensor_meta=TensorMeta(shape, stride, local.dtype)), requires_grad=False)


def operator_mode() -> type:
    """The class of contexts whose `__torch_dispatch__(func, types, args, kwargs)` stands in the place of every operator below autograd."""
    from torch.utils._python_dispatch import TorchDispatchMode

    return TorchDispatchMode


def extension_folder(name: str) -> Path:
    """Where torch builds the C++ extension `name`; the folder is made."""
    from torch.utils.cpp_extension import _get_build_directory

    return Path(_get_build_directory(name, verbose=False))
