"""Models that this world's ranks share for generation: logits, losses, and generated tokens."""

from argparse import Namespace
from pathlib import Path

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from llmtrain.config.model import ModelConfig
from llmtrain.config.train import ParallelConfig
from llmtrain.device import select
from llmtrain.model import initialise
from llmtrain.model.decode import CachedRunner, generate
from llmtrain.model.sampling import Sampling
from llmtrain.model.scoring import cross_entropy_sum
from llmtrain.ops import Mask
from llmtrain.parallel import mesh as world
from llmtrain.tools.host_layers import host_blocks
from llmtrain.tools.open_model import OpenModel, empty_model, open_model, read_model_config
from llmtrain.tools.shared import mesh_axes

PROMPTS = [[5, 3, 9], [1, 2, 3, 4, 5, 6, 7], [11]]


def ask(models: dict[str, str | dict], meshes: dict[str, dict[str, dict]]) -> dict[str, dict[str, dict]]:
    """What each model, a folder or a model section, answers on each of its meshes, which are options of `llmtrain generate`."""
    torch.set_num_threads(1)
    answers: dict[str, dict[str, dict]] = {}
    for name, source in models.items():
        answers[name] = {}
        for shape, axes in meshes[name].items():
            cfg = read_model_config(source) if isinstance(source, str) else ModelConfig.model_validate(source)
            options = Namespace(**{"tp": 1, "pp": 1, "ep": 1, "tp_chunks": 1, "host_layers": "0"} | axes)
            mesh = world.start(ParallelConfig(**mesh_axes(options, cfg)), device=select("cpu"))
            model = opened(source, mesh if mesh.world > 1 else None)
            if options.tp_chunks > 1:
                model.set_tp_chunks(options.tp_chunks)
            answers[name][shape] = answer(model, mesh, host=options.host_layers)
            mesh.leave()
    return answers


def opened(source: str | dict, mesh: world.Mesh | None) -> nn.Module:
    """The model of a folder in float64, or one of a model section with drawn weights."""
    if isinstance(source, str):
        return open_model(Path(source), device="cpu", dtype="fp64", mesh=mesh).model
    cfg = ModelConfig.model_validate(source)
    model = empty_model(cfg, select("cpu"), torch.float64, mesh)
    part = model.part if mesh is not None else model
    initialise(part, cfg, 3)
    with torch.no_grad():
        for name, parameter in part.named_parameters():
            if name.endswith("bias"):  # else a bias that is added twice would not show
                whole = torch.linspace(-0.3, 0.4, parameter.numel(), dtype=torch.float64).view(parameter.shape)
                spread = isinstance(parameter, DTensor)
                parameter.copy_(distribute_tensor(whole, parameter.device_mesh, parameter.placements) if spread else whole)
    return model


@torch.no_grad()
def answer(model: nn.Module, mesh: world.Mesh, *, host: str) -> dict:
    """Logits, greedy tokens with a cache, of which `host` layers are on the host, a loss, and how many numbers each rank holds."""
    tokens = torch.arange(22).reshape(2, 11) * 7 % 97
    logits = model(tokens, mask=Mask())["logits"]
    asked = Namespace(host_layers=host, tp=mesh.shape.tp, tp_chunks=1)
    blocks = host_blocks(asked, OpenModel(model, model.cfg, None), mesh, slots=3, capacity=20)
    rows = generate(CachedRunner(model, slots=3, capacity=20, host=blocks), PROMPTS, Sampling(max_new=9, temperature=0))
    nats, count = cross_entropy_sum(model, torch.arange(40) * 5 % 97, context=16)
    held = sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in model.parameters())
    return {"logits": logits.numpy(), "tokens": [row.tokens for row in rows], "loss": nats / count, "held": mesh.gather(held)}
