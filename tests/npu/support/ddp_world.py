"""Training with torch's own DistributedDataParallel, for people whose loop is theirs: llmtrain's model, losses and gradients to compare."""

import os

import sameness
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from llmtrain.config.run import RunConfig
from llmtrain.device import select
from llmtrain.device.base import Device
from llmtrain.device.dtypes import torch_dtype
from llmtrain.model import family
from llmtrain.model.init import initialise
from llmtrain.ops import Call, Mask, resolve

SAMPLES = 8


def train_all(kind: str, precisions: list[str], steps: int) -> dict[str, dict]:
    """By precision: losses of every step and gradients of the first, of this world's ranks (one, or DDP over all) on devices of `kind`."""
    torch.set_num_threads(1)
    device = select(kind, 0)
    device.set_current()
    if os.environ["WORLD_SIZE"] != "1":
        dist.init_process_group(device.collective_backend)
    return {precision: train(device, precision, steps) for precision in precisions}


def train(device: Device, precision: str, steps: int) -> dict:
    """One run."""
    ranks, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    model = build_model(device, RunConfig.model_validate(sameness.merge(sameness.BASE, {"precision": precision})))
    wrapped = DistributedDataParallel(model) if ranks > 1 else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses, gradients = [], {}
    for step in range(steps):
        batch = sameness.Documents().batch(step * SAMPLES + rank * SAMPLES // ranks, SAMPLES // ranks)
        mask = Mask(causal=True, documents=batch.documents)
        tokens, targets, positions = (part.to(device.torch_device) for part in (batch.tokens, batch.targets, batch.positions))
        count = _sum(torch.tensor(float(batch.target_count), device=device.torch_device))
        loss = wrapped(tokens, mask=mask, positions=positions, targets=targets)["ce_sum"] / count
        (loss * ranks).backward()  # DDP takes the mean over ranks
        gradients = gradients or {name: p.grad.cpu().double().numpy() for name, p in model.named_parameters()}
        losses.append(_sum(loss.detach().float()).item())
        optimizer.step()
        optimizer.zero_grad()
    return {"losses": losses, "gradients": gradients}


def build_model(device: Device, cfg: RunConfig) -> nn.Module:
    """llmtrain's model with its initial weights on `device`."""
    dtype = torch_dtype(cfg.precision.params)
    call = Call(device=device.kind, dtype=dtype, documents=True, head_dim=8, heads=4, kv_heads=2)
    model = family.build(cfg.model, resolve(cfg.kernels, call), cfg.train.loss_chunk).to(dtype)
    model = model.to_empty(device=device.torch_device)
    initialise(model, cfg.model, cfg.seed)
    return model


def _sum(value: torch.Tensor) -> torch.Tensor:
    if dist.is_initialized():
        dist.all_reduce(value)
    return value
