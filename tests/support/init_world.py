"""Initialise sharded models in this world and hand back whole tensors."""

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from llmtrain.config.model import ModelConfig
from llmtrain.model import build, initialise
from llmtrain.ops import Call, resolve


def whole_model(values: dict, seed: int) -> dict[str, torch.Tensor]:
    """Parameters initialised in one piece."""
    cfg, model = _on_meta(values)
    model.to_empty(device="cpu")
    initialise(model, cfg, seed)
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def sharded_models(values: dict, seed: int) -> dict[str, dict[str, torch.Tensor]]:
    """Whole parameters of models initialised in shards, by how they were sharded."""
    ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else None
    if ranks is None:
        torch.distributed.init_process_group("gloo")
        ranks = torch.distributed.get_world_size()
    mesh = init_device_mesh("cpu", (ranks,))
    out = {}
    for how, shard in {"fsdp": _fsdp, "fsdp, tied": _fsdp, "last dim": _last_dim, "two axes": _two_axes}.items():
        cfg, model = _on_meta(values | {"tie_embeddings": how == "fsdp, tied"})
        model = shard(model, mesh)
        model.to_empty(device="cpu")
        initialise(model, cfg, seed)
        assert (model.head.weight is model.embedding.weight) == cfg.tie_embeddings
        assert any(isinstance(parameter, DTensor) for parameter in model.parameters())
        out[how] = {n: p.full_tensor() if isinstance(p, DTensor) else p.detach() for n, p in model.named_parameters()}
    torch.distributed.destroy_process_group()
    return out


def _on_meta(values: dict):
    torch.set_num_threads(1)
    cfg = ModelConfig.model_validate(values)
    with torch.device("meta"):
        return cfg, build(cfg, resolve({}, Call(device="cpu", dtype=torch.float32)), 16)


def _fsdp(model, mesh):
    for block in model.blocks.values():
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def _last_dim(model, mesh):
    return _distribute(model, mesh, lambda p: [Shard(p.ndim - 1)])


def _two_axes(model, mesh):
    grid = init_device_mesh("cpu", (1, mesh.size()), mesh_dim_names=("a", "b"))
    return _distribute(model, grid, lambda p: [Shard(0), Shard(p.ndim - 1)])


def _distribute(model, mesh, placements):
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            sharded = distribute_tensor(parameter.detach(), mesh, placements(parameter), src_data_rank=None)
            module.register_parameter(name, nn.Parameter(sharded))
    return model
