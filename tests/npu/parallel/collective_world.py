"""Products joined with collectives in a world of NPUs, against formulas in float64 over all ranks' data, which each draws alike."""

import os
from contextlib import nullcontext
from dataclasses import replace

import torch
import torch.distributed as dist
from checks import between
from collective_faults import BY_NAME
from sameness import replaced
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from llmtrain.device import select
from llmtrain.model.experts import Experts
from llmtrain.ops import Call, resolve
from llmtrain.parallel import ops
from llmtrain.parallel.ep_fused import FusedExperts
from llmtrain.parallel.ops import npu_experts, npu_limits

OF = npu_experts.Exchange.of
WIDTHS = (12, 16, 10)
"""Of products from 16: the second is square, so that no shape tells whether it is transposed."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def in_world(cases: dict[str, dict]) -> dict[str, dict]:
    """Cases by name, each a function of this module and its arguments; the largest differences on any rank, and calls by operator."""
    import stand_in

    torch.set_num_threads(1)
    device = select("npu", int(os.environ["LOCAL_RANK"]))
    device.set_current()
    dist.init_process_group("hccl")
    found = {}
    for name, case in cases.items():
        case = dict(case)
        stand_in.calls.clear()
        differences = globals()[case.pop("check")](dist.group.WORLD, device.torch_device, **case)
        everyone: list = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, differences)
        found[name] = {"differences": {key: max(one[key] for one in everyone) for key in differences}, "calls": dict(stand_in.calls)}
    return found


def train_all(scenarios: dict[str, dict]) -> dict[str, dict]:
    """As npu_world.train_all, where the operators have no limits but what the stand-in's formulas compute."""
    import npu_world

    every, ranks = (torch.float64, torch.float32, torch.bfloat16), {"Atlas A2": (2,), "Atlas A3": (2,)}
    npu_limits.PAIRS = replace(npu_limits.PAIRS, dtypes=every, ranks=ranks, sums=range(1, 65535))
    npu_limits.EXCHANGE = replace(npu_limits.EXCHANGE, dtypes=every, ranks=ranks, sent=range(1, 100 << 20))
    return npu_world.train_all(scenarios)


def random(*sizes: int, seed: int) -> Tensor:
    return torch.randn(sizes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def difference(found: Tensor, expected: Tensor) -> float:
    """Largest difference, as a share of the largest expected number, if there is one that is not 0."""
    found = found.detach().cpu().double()
    assert found.shape == expected.shape, (found.shape, expected.shape)
    return float((found - expected).abs().max() / (expected.abs().max() or 1.0)) if expected.numel() else 0.0


class Leaves:
    """Tensors of this rank on the NPU in `dtype`, with gradients; `exact` gives a float64 tensor the values that they have there."""

    def __init__(self, device: torch.device, dtype: str):
        self.device, self.dtype = device, DTYPES[dtype]

    def exact(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.dtype).double()

    def here(self, tensor: Tensor, *, grad: bool = True) -> Tensor:
        return tensor.to(self.dtype).to(self.device).requires_grad_(grad)


def gather_matmul(group, device, *, dtype: str, batch: int, length: int, bias: bool = True) -> dict[str, float]:
    """all_gather_matmul with three weights, the second without a bias."""
    ranks, me, leaves = group.size(), group.rank(), Leaves(device, dtype)
    x = leaves.exact(random(batch, length, 16, seed=1))
    weights = [[leaves.exact(random(f, 16, seed=30 + 3 * r + i)) for i, f in enumerate(WIDTHS)] for r in range(ranks)]
    biases = [leaves.exact(random(f, seed=60 + me)) if bias and i != 1 else None for i, f in enumerate(WIDTHS)]
    grads = [[leaves.exact(random(batch, length, f, seed=90 + 3 * r + i)) for i, f in enumerate(WIDTHS)] for r in range(ranks)]
    mine = leaves.here(x.chunk(ranks, 1)[me])
    own_weights, own_biases = [leaves.here(w) for w in weights[me]], [None if b is None else leaves.here(b) for b in biases]
    outs = ops.all_gather_matmul(mine, own_weights, own_biases, group=group, implementation="mc2")
    torch.autograd.backward(outs, [leaves.here(grad, grad=False) for grad in grads[me]])
    found = {}
    for i, (out, weight) in enumerate(zip(outs, own_weights)):
        expected = torch.einsum("bsd,fd->bsf", x, weights[me][i])
        found[f"out {i}"] = difference(out, expected if biases[i] is None else expected + biases[i])
        found[f"dW {i}"] = difference(weight.grad, torch.einsum("bsf,bsd->fd", grads[me][i], x))
        if biases[i] is not None:
            found[f"db {i}"] = difference(own_biases[i].grad, grads[me][i].sum((0, 1)))
    of_x = sum(torch.einsum("bsf,fd->bsd", g, w) for gs, ws in zip(grads, weights) for g, w in zip(gs, ws))
    return found | {"dx": difference(mine.grad, of_x.chunk(ranks, 1)[me])}


def matmul_scatter(group, device, *, dtype: str, batch: int, length: int) -> dict[str, float]:
    """matmul_reduce_scatter of a tensor with heads."""
    ranks, me, leaves = group.size(), group.rank(), Leaves(device, dtype)
    x = [leaves.exact(random(batch, length, 3, 4, seed=1 + r)) for r in range(ranks)]
    weights = [leaves.exact(random(8, 12, seed=30 + r)) for r in range(ranks)]
    grad = leaves.exact(random(batch, length, 8, seed=50))
    mine, weight = leaves.here(x[me]), leaves.here(weights[me])
    out = ops.matmul_reduce_scatter(mine, weight, group=group, implementation="mc2")
    out.backward(leaves.here(grad.chunk(ranks, 1)[me], grad=False))
    expected = sum(torch.einsum("bsf,df->bsd", a.flatten(2), w) for a, w in zip(x, weights))
    return {
        "out": difference(out, expected.chunk(ranks, 1)[me]),
        "dx": difference(mine.grad.flatten(2), torch.einsum("bsd,df->bsf", grad, weights[me])),
        "dW": difference(weight.grad, torch.einsum("bsd,bsf->df", grad, x[me].flatten(2))),
    }


EXPERTS, D, K = 4, 8, 2


def mixture(x: Tensor, probs: Tensor, ids: Tensor, weights: list[Tensor]) -> Tensor:
    """The formula, expert by expert over all tokens, with tokens that did not choose it weighed by 0: x [N,D], probs and ids [N,k]."""
    *gates, up, down = weights
    out = torch.zeros_like(x)
    for expert in range(EXPERTS):
        h = x @ up[expert]
        if gates:
            g = x @ gates[0][expert]
            h = g / (1 + torch.exp(-g)) * h
        else:
            h = 0.5 * h * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (h + 0.044715 * h**3)))
        out = out + (probs * (ids == expert)).sum(1, keepdim=True) * (h @ down[expert])
    return out


def fused_experts(
    group,
    device,
    *,
    dtype: str,
    sizes: list[int],
    activation: str = "swiglu",
    avoided: tuple[int, ...] = (),
    sharded: bool = False,
    width: int = 12,
) -> dict[str, float]:
    """FusedExperts on `sizes[rank]` tokens of each rank, none of which chooses an expert of `avoided`."""
    ranks, me, leaves = group.size(), group.rank(), Leaves(device, dtype)
    tokens, held = sum(sizes), EXPERTS // ranks
    x, grad = (leaves.exact(random(tokens, D, seed=s)) for s in (1, 2))
    scores = random(tokens, EXPERTS, seed=3)
    scores[:, list(avoided)] = -torch.inf
    probs, ids = scores.softmax(1).topk(K, dim=1)
    shapes = [(EXPERTS, D, width)] * (2 if activation == "swiglu" else 1) + [(EXPERTS, width, D)]
    weights = [leaves.exact(0.5 * random(*shape, seed=10 + i)) for i, shape in enumerate(shapes)]
    whole = [tensor.clone().requires_grad_() for tensor in (x, leaves.exact(probs), *weights)]
    expected = mixture(whole[0], whole[1], ids, whole[2:])
    expected.backward(grad)

    call = Call(device="npu", dtype=leaves.dtype, expert_widths=(D, width))
    experts = Experts(held, D, width, ops=resolve({}, call), activation=activation).to(device)
    names = ["gate_proj"] * (activation == "swiglu") + ["up_proj", "down_proj"]
    with torch.no_grad():
        for name, weight in zip(names, weights):
            getattr(experts, name).copy_(weight[me * held : (me + 1) * held])
    if sharded:
        alone = dist.device_mesh.init_device_mesh("npu", (ranks, 1), mesh_dim_names=("ep", "efsdp"))["efsdp"]
        fully_shard(experts, mesh=alone, mp_policy=MixedPrecisionPolicy(param_dtype=leaves.dtype))
    else:
        experts = experts.to(leaves.dtype)
    layer, mine = FusedExperts(experts, group, EXPERTS), slice(sum(sizes[:me]), sum(sizes[: me + 1]))
    own = leaves.here(x[mine]), leaves.here(probs[mine])
    out = layer(*own, ids[mine].to(device))
    out.backward(leaves.here(grad[mine], grad=False))
    found = {"out": difference(out, expected.detach()[mine])}
    found |= {name: difference(leaf.grad, all_.grad[mine]) for name, leaf, all_ in zip(("dx", "dprobs"), own, whole)}
    for name, all_ in zip(names, whole[2:]):
        gradient = getattr(experts, name).grad
        gradient = gradient.to_local() if hasattr(gradient, "to_local") else gradient
        found[f"d {name}"] = difference(gradient, all_.grad[me * held : (me + 1) * held])
    return found


def faulty(group, device, *, fault: str, of: str, **case) -> dict[str, float]:
    """A check with a fault in the package: the differences it makes, or `refused` where an operator refuses the call."""
    try:
        with between(BY_NAME[fault].change) if fault in BY_NAME else OTHERS[fault]():
            return globals()[of](group, device, **case)
    except (ValueError, RuntimeError, AssertionError):
        return {"refused": 9.0}


def _by_expert(counts, group, grouped_mm):
    """Received counts read as [expert][rank] where they come as [rank][expert]."""
    right = OF(counts, group, grouped_mm)
    return replace(right, arriving=torch.tensor(right.arriving).view(group.size(), -1).t().flatten().tolist())


OTHERS = {"no fault": nullcontext, "counts by expert first": lambda: replaced(npu_experts.Exchange, "of", _by_expert)}
"""Faults, or none, that are not in an operator's arguments."""
