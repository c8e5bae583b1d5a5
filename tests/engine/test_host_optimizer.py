"""Moments on the host: the numbers of LocalOptimizer bit for bit, a slice at a time on the device."""

import pytest
import torch
from torch import nn

from llmtrain.compat import memory_of
from llmtrain.config.sparing import MOMENT_SLICES
from llmtrain.config.train import OptimConfig
from llmtrain.device.host_copies import HostCopies
from llmtrain.engine.host_optimizer import UNIT, HostOptimizer
from llmtrain.engine.local_optimizer import LocalOptimizer
from llmtrain.ops import Call, resolve

SHAPES = {"table": (701, 33), "blocks.0.weight": (64, 64), "blocks.0.bias": (7,), "norm": (1,), "turned": (40, 24), "idle": (5, 5)}
CFG = OptimConfig(no_decay=["*.bias", "norm"])
KERNELS = ("fused", "foreach", "loop")


class Slices(HostCopies):
    """What the device holds of the moments."""

    def __init__(self):
        self.held: dict = {}
        self.peak = self.arrived = self.left = 0

    def device_memory(self, like):
        memory = super().device_memory(like)
        self.held[memory_of(memory)] = memory.nbytes
        self.arrived += memory.nbytes
        self.peak = max(self.peak, sum(size for key, size in self.held.items() if not key.expired()))
        return memory

    def to_host(self, tensor, *, into=None):
        self.left += tensor.nbytes
        return super().to_host(tensor, into=into)


def parameters(dtype: torch.dtype) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    found = {name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for name, shape in SHAPES.items()}
    found["turned"] = found["turned"].t()  # not consecutive in memory
    return {name: nn.Parameter(value) for name, value in found.items()}


def pair(kernel: str, dtype: torch.dtype):
    torch.set_num_threads(1)
    ops, copies = resolve({"adamw": kernel}, Call(device="cpu", dtype=dtype)), Slices()
    return LocalOptimizer(parameters(dtype), CFG, ops=ops), HostOptimizer(parameters(dtype), CFG, ops=ops, copies=copies), copies


def step(optimizers, index: int) -> None:
    """One step of each with the same gradients; some parameters have none."""
    generator = torch.Generator().manual_seed(index)
    for name, shape in SHAPES.items():
        gradient = torch.randn(shape, generator=generator, dtype=torch.float64)
        for optimizer in optimizers:
            parameter = optimizer.parameters[name]
            if name != "idle" or index == 2:
                parameter.grad = (gradient.t() if name == "turned" else gradient).to(parameter.dtype)
    for optimizer in optimizers:
        optimizer.step(lr=0.1 / (index + 1))
        optimizer.zero_grad()


def same(plain: LocalOptimizer, host: HostOptimizer) -> bool:
    both = [(o.parameters[name], *o.moments[name]) for name in SHAPES for o in (plain, host)]
    return all(torch.equal(mine, theirs) for one, other in zip(both[::2], both[1::2]) for mine, theirs in zip(one, other))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_steps_are_those_of_moments_on_the_device(kernel, dtype):
    plain, host, _ = pair(kernel, dtype)
    for index in range(5):
        step((plain, host), index)
        assert same(plain, host), f"step {index}"
    assert any(moment.abs().max() > 0 for moment in host.moments["idle"])


def test_the_device_holds_three_slices():
    _, host, copies = pair("fused", torch.float32)
    step((host,), 0)
    moved = 8 * sum(torch.Size(shape).numel() for name, shape in SHAPES.items() if name != "idle")
    assert copies.arrived == copies.left == moved
    assert copies.peak <= 3 * moved / MOMENT_SLICES + 3 * 8 * (UNIT + 40 * 24)  # what is not consecutive is not cut
    assert not [key for key in copies.held if not key.expired()]


def test_loaded_moments_go_on():
    plain, host, _ = pair("fused", torch.float64)
    for index in range(2):
        step((plain, host), index)
    ops = resolve({"adamw": "fused"}, Call(device="cpu", dtype=torch.float64))
    again = HostOptimizer(host.parameters, CFG, ops=ops, copies=Slices())
    for name, moments in plain.moments.items():
        for mine, theirs in zip(again.moments[name], moments):
            mine.copy_(theirs)
    again.set_steps(2)
    plain.set_steps(2)  # also of what had no gradient
    for index in range(2, 4):
        step((plain, again), index)
        assert same(plain, again)
