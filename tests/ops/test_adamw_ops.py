"""AdamW: every implementation against the update written out."""

import math

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from llmtrain.ops import implementations

ADAMW = [pytest.param(entry.function, id=entry.name) for entry in implementations("adamw") if "cpu" in entry.devices]
LR, BETAS, EPS, DECAY = 0.1, (0.9, 0.95), 1e-8, 0.1


def formula(start, gradients, decay):
    """Decoupled weight decay, bias-corrected moments, one element at a time."""
    weights = []
    for element, value in enumerate(start.flatten().tolist()):
        m = v = 0.0
        for step, gradient in enumerate(gradients, 1):
            g = gradient.flatten()[element].item()
            m, v = BETAS[0] * m + (1 - BETAS[0]) * g, BETAS[1] * v + (1 - BETAS[1]) * g * g
            value -= LR * decay * value
            value -= LR * (m / (1 - BETAS[0] ** step)) / (math.sqrt(v / (1 - BETAS[1] ** step)) + EPS)
        weights.append(value)
    return torch.tensor(weights, dtype=torch.float64).view_as(start)


def run(adamw, params, gradients):
    groups = [{"params": params[:1], "weight_decay": DECAY}, {"params": params[1:], "weight_decay": 0.0}]
    optimizer = adamw(groups, lr=LR, betas=BETAS, eps=EPS)
    for step in gradients:
        for param, gradient in zip(params, step):
            param.grad = (
                gradient.to(param.dtype) if not isinstance(param, DTensor) else distribute_tensor(gradient, param.device_mesh, [Shard(0)])
            )
        optimizer.step()


@pytest.mark.parametrize("adamw", ADAMW)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_three_steps_are_the_formula(adamw, dtype, tolerance):
    torch.manual_seed(0)
    start = [torch.randn(3, 37, dtype=torch.float64).to(dtype) for _ in range(2)]
    gradients = [[torch.randn(3, 37, dtype=torch.float64).to(dtype) for _ in range(2)] for _ in range(3)]
    params = [torch.nn.Parameter(x.clone()) for x in start]
    run(adamw, params, gradients)
    for index, decay in ((0, DECAY), (1, 0.0)):
        expected = formula(start[index], [step[index] for step in gradients], decay)
        torch.testing.assert_close(params[index].detach().double(), expected, rtol=tolerance, atol=tolerance)


@pytest.fixture
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield DeviceMesh("cpu", [0])
    dist.destroy_process_group()


@pytest.mark.parametrize("adamw", ADAMW)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sharded_parameters_move_as_plain_ones(adamw, dtype, one_rank):
    torch.manual_seed(0)
    start, gradients = (
        [torch.randn(4, 5, dtype=dtype) for _ in range(2)],
        [[torch.randn(4, 5, dtype=dtype) for _ in range(2)] for _ in range(2)],
    )
    plain = [torch.nn.Parameter(x.clone()) for x in start]
    sharded = [torch.nn.Parameter(distribute_tensor(x.clone(), one_rank, [Shard(0)])) for x in start]
    run(adamw, plain, gradients)
    run(adamw, sharded, gradients)
    for a, b in zip(plain, sharded):
        torch.testing.assert_close(a, b.full_tensor(), rtol=0, atol=0)
