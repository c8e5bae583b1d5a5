"""Data parallelism by FSDP2: replicate, shard, or both (HSDP), with gradients summed, never averaged."""

from functools import partial

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from llmtrain.compat import fsdp_sum_gradients, watch_fsdp_collectives
from llmtrain.config.train import PrecisionConfig
from llmtrain.device.dtypes import torch_dtype
from llmtrain.model.experts import Experts
from llmtrain.parallel.blocks import all_blocks
from llmtrain.parallel.hang.where import count, recorded


def apply_fsdp(
    model: nn.Module, *, mesh: DeviceMesh, precision: PrecisionConfig, reshard_after_forward: bool, expert_mesh: DeviceMesh | None = None
) -> None:
    """Shard every block, the embedding, the head with the norm before it (unless they are tied), and then the rest of `model`, in place.

    Gradients come out as plain sums over ranks, since the loss is already divided by the target count of the whole step. The last
    block, the head and the root stay gathered between forward and backward: they are needed again at once. So does everything on one rank,
    where gathering is but a cast. Experts are sharded over `expert_mesh` instead where it is given.
    """
    reshard_after_forward = reshard_after_forward and mesh.size() > 1
    compute, params = torch_dtype(precision.compute), torch_dtype(precision.params)
    policy = MixedPrecisionPolicy(param_dtype=None if compute == params else compute, reduce_dtype=torch_dtype(precision.reduce))
    blocks = list(all_blocks(model))
    for block in blocks:
        again = reshard_after_forward and block is not blocks[-1]
        for module in block.modules() if expert_mesh is not None else ():
            if isinstance(module, Experts):
                fully_shard(module, mesh=expert_mesh, mp_policy=policy, reshard_after_forward=again)
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=again)
    if model.head is None or model.embedding is None or model.head.weight is not model.embedding.weight:
        if model.embedding is not None:
            fully_shard(model.embedding, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard_after_forward)
            model.embedding.set_unshard_in_backward(False)  # the gradient of a lookup does not need the table
        if model.head is not None:
            # Heads of multi-token prediction call both in turn, which FSDP2 would take for several passes.
            modules = [model.final_norm, model.head] if getattr(model, "mtp", None) is None else model.head
            fully_shard(modules, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    # Replicas of dense layers and of experts are the same ranks.
    summed = partial(count, "all_reduce", mesh.get_group("dp_replicate")) if mesh.ndim > 1 else None
    for module in model.modules():
        if isinstance(module, FSDPModule):
            fsdp_sum_gradients(module)
            watch_fsdp_collectives(module, recorded, summed=summed)


def set_gradient_sync(model: nn.Module, on: bool) -> None:
    """Whether the next backward reduces gradients over ranks, or only accumulates them."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(on)


def release_gathered(model: nn.Module) -> None:
    """Drop gathered copies that a forward pass left, so that what is written to the modules' parameters goes to the shards."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def local_tensor(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """This rank's part of a DTensor, differentiably; a plain tensor, or None, itself.

    Read a module's parameters at every call: FSDP2 puts gathered ones in their place.
    """
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
