"""A model made parallel from outside: one function per axis, in one fixed order."""

import copy
from collections.abc import Callable

import torch
from torch import nn

from llmtrain.config.run import RunConfig
from llmtrain.device.base import Device
from llmtrain.device.dtypes import torch_dtype
from llmtrain.errors import UserError
from llmtrain.layout.pipeline import PipelinePlan
from llmtrain.model.transformer import cut
from llmtrain.parallel.capacity import apply_capacity
from llmtrain.parallel.cast import apply_cast
from llmtrain.parallel.choices import choices
from llmtrain.parallel.compile import apply_compile
from llmtrain.parallel.cp import ContextParallel, apply_cp
from llmtrain.parallel.ep import apply_ep
from llmtrain.parallel.fsdp import apply_fsdp
from llmtrain.parallel.gradients import partial_over_tp
from llmtrain.parallel.hang.where import watch_layers
from llmtrain.parallel.mesh import Mesh
from llmtrain.parallel.offload import apply_offload
from llmtrain.parallel.recompute import apply_recompute
from llmtrain.parallel.tp import apply_tp


def stage_models(build: Callable[[], nn.Module], *, plan: PipelinePlan | None, rank: int) -> dict[int, nn.Module]:
    """The pipeline stages of `rank`, by number: each a model of its own on meta, without the parts that other stages hold.

    Without a plan the whole model is stage 0. Raises UserError for a model that cannot be cut.
    """
    with torch.device("meta"):
        whole = build()
    if plan is None:
        return {0: whole}
    if not hasattr(whole, "first_stage"):
        raise UserError(f"parallel.pp: {type(whole).__name__} cannot be cut into pipeline stages; set parallel.pp: 1")
    # Building hundreds of blocks takes longer than all the rest. Each is in one stage, so they need no copies; the ends may be in two.
    shared = {id(block): block for block in whole.blocks.values()}
    stages = {stage: copy.deepcopy(whole, dict(shared)) for stage in plan.stages_of(rank)}
    for stage, model in stages.items():
        cut(model, blocks=plan.blocks(stage), first=stage == 0, last=stage == plan.stages - 1)
    return stages


def apply(model: nn.Module, cfg: RunConfig, *, mesh: Mesh, device: Device, cp: ContextParallel | None, compiled: bool) -> set[str]:
    """Make `model` (on meta) run on its part of the mesh, and give it memory; parameter names do not change.

    Returns the names of the trained parameters whose gradients are partial sums over tp.
    """
    names = [name for name, _ in model.named_parameters()]
    shape, parallel, precision = mesh.shape, cfg.parallel, cfg.precision
    hardware = device.hardware()
    chosen = choices(cfg, shape, device=device.kind, hardware=hardware.key if hardware else None)
    if shape.tp > 1:
        apply_tp(model, mesh.device_mesh["tp"], chunks=parallel.tp_chunks, implementation=chosen.tp.name)
    if cp is not None:
        apply_cp(model, cp)
    if mesh.experts is not None:
        kind = chosen.ep.name if chosen.ep else "all_to_all"
        apply_ep(model, expert_mesh=mesh.experts, tp_group=mesh.group("tp"), kind=kind, nodes=mesh.nodes)
    apply_capacity(model, tp_group=mesh.group("tp"), cp=cp)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    partial = {name for name, parameter in trained.items() if shape.tp > 1 and partial_over_tp(parameter)}
    if compiled:
        apply_compile(model)
    sharded = shape.shares_parameters
    if not sharded and precision.compute != precision.params:
        apply_cast(model, torch_dtype(precision.compute))
    apply_recompute(model, cfg.train.recompute)
    apply_offload(model, cfg.train.offload, device.host_copies())
    if sharded:
        apply_fsdp(
            model,
            mesh=mesh.fsdp_mesh(),
            precision=precision,
            # A pipeline would gather every block again for each micro-batch.
            reshard_after_forward=parallel.reshard_after_forward and shape.pp == 1,
            expert_mesh=mesh.expert_fsdp_mesh() if mesh.experts is not None else None,
        )
    watch_layers(model)
    model.to_empty(device=device.torch_device)
    assert names == [name for name, _ in model.named_parameters()], "wrapping must not change canonical names"
    return partial
