"""Errors of one implementation against the float64 reference on the CPU, forward and gradients."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from llmtrain.device import Device
from llmtrain.device.dtypes import DTYPES, torch_dtype
from llmtrain.ops import Call, Implementation, Ops, choose, implementations, op_names
from llmtrain.ops.registry import PARAMETER_OPS
from llmtrain.tools.selftest.kernel_cases import Case, cases

FLOOR = {torch.float64: 64, torch.float32: 64, torch.bfloat16: 2, torch.float16: 2}
"""Units of the format's epsilon that are always allowed, relative to the norm of what is compared."""
TIMES = 4.0
"""How many times the reference's own error in the same format an implementation may have."""


def list_kernels(*, device: Device) -> tuple[dict, None]:
    """Every op with its implementations and whether there are cases for it, the formats of the device, and the device in words."""
    here = {op: [entry.name for entry in implementations(op) if device.kind in entry.devices] for op in op_names()}
    ops = {op: {"implementations": names, "cases": len(cases(op))} for op, names in here.items()}
    formats = [name for name, dtype in DTYPES.items() if device.unsupported_dtype(dtype) is None]
    return {"ops": ops, "formats": formats, "device": device.describe(), "name": device.name(), "count": device.count()}, None


def kernel(*, device: Device, op: str, implementation: str, formats: list[str]) -> tuple[dict, None]:
    """Lines per format and case: `refused` with the reason, or errors and bounds per output and gradient."""
    entry = next(e for e in implementations(op) if e.name == implementation)
    lines = []
    for name in formats if op not in PARAMETER_OPS else [f for f in formats if f in ("fp64", "fp32")]:  # as precision.params
        dtype = torch_dtype(name)
        for case in cases(op):
            line = {"op": op, "implementation": implementation, "format": name, "case": case.name}
            facts = {"parameter_dtype": dtype, **case.facts}
            call = Call(device=device.kind, dtype=dtype, capability=device.capability(), **facts)
            reason = entry.refusal(call)
            lines.append(
                line | ({"state": "refused", "why": reason} if reason else _judge(case, op, _function(entry, call), dtype, device))
            )
    return {"lines": lines}, None


def _function(entry: Implementation, call: Call) -> Callable:
    """What is called, with the ops that the implementation is made of chosen for the same call."""
    wanted = {part: choose(part, call) for part in entry.parts} | {entry.op: choose(entry.op, call, entry.name)}
    return getattr(Ops(wanted), entry.op)


def _judge(case: Case, op: str, function: Callable, dtype: torch.dtype, device: Device) -> dict:
    plain = next(e for e in implementations(op) if e.speed == 0).function
    cpu = torch.device("cpu")
    exact = evaluate(case, plain, torch.float64, cpu, rounded=dtype)
    same = evaluate(case, plain, dtype, cpu)
    ours = evaluate(case, function, dtype, device.torch_device)
    device.synchronize()
    if ours.keys() != exact.keys():
        return {"state": "failed", "why": f"gives {', '.join(ours)} instead of {', '.join(exact)}"}
    wrong = [f"{n} has shape {tuple(t.shape)} instead of {tuple(exact[n].shape)}" for n, t in ours.items() if t.shape != exact[n].shape]
    if wrong:
        return {"state": "failed", "why": "; ".join(wrong)}
    floor = FLOOR[dtype] * torch.finfo(dtype).eps
    parts = {}
    for name, value in ours.items():
        error, own = difference(value, exact[name]), TIMES * difference(same[name], exact[name])
        bound = max(floor, own) if math.isfinite(own) else floor
        parts[name] = {"error": error, "bound": bound, "passed": bool(error <= bound)}
    return {"state": "passed" if all(p["passed"] for p in parts.values()) else "failed", "parts": parts}


def evaluate(
    case: Case, function: Callable, dtype: torch.dtype, device: torch.device, *, rounded: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Outputs and gradients of `case` by name, as float64 on the CPU.

    rounded: the format in which the numbers are to exist before they are widened to `dtype`, so that both sides see the same ones.
    """
    tensors = {}
    for name, tensor in case.tensors.items():
        if tensor.is_floating_point():
            own, seen = (_format(name, case, d) for d in (dtype, rounded or dtype))
            tensor = tensor.to(seen).to(own).to(device).requires_grad_(name in case.grad)
        else:
            tensor = tensor.to(device)
        tensors[name] = tensor
    outputs = case.call(function, tensors)
    found = {name: output.detach() for name, output in outputs.items()}
    if case.grad:
        total = sum((o * _slope(o, rounded or dtype)).sum() for o in outputs.values() if o.requires_grad)
        gradients = torch.autograd.grad(total, [tensors[name] for name in case.grad])
        found |= {f"d {name}": gradient for name, gradient in zip(case.grad, gradients)}
    return {name: value.detach().cpu().double() for name, value in found.items()}


def _format(name: str, case: Case, dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32) if name in case.wide else dtype


def _slope(output: Tensor, dtype: torch.dtype) -> Tensor:
    """What comes from above in the backward pass: the same numbers for every format, representable in each."""
    generator = torch.Generator().manual_seed(7)
    return torch.randn(output.shape, generator=generator, dtype=torch.float64).to(dtype).to(output.dtype).to(output.device)


def difference(ours: Tensor, exact: Tensor) -> float:
    """Norm of the difference relative to the norm of what is right; infinite where something is not finite that should be."""
    same = ours == exact  # infinities of one sign are equal
    if not torch.isfinite(ours[~same]).all():
        return float("inf")
    left = torch.where(same, 0.0, ours - exact)
    scale = torch.where(torch.isfinite(exact), exact, 0.0).norm().item()
    return left.norm().item() / (scale or 1.0)
