"""The columns that one process can give: schema, fake, numerics, gradients. Each raises where a case fails; `host` is one of its own."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from case import ERRORS, Case, Inputs
from torch import Tensor

from llmtrain.ops.npu import gateway
from llmtrain.ops.npu.masks import triangle


class Seen(NamedTuple):
    """A call as it was written, before the dispatcher sorts its arguments."""

    op: str
    args: tuple
    kwargs: dict[str, Any]


@contextmanager
def between(change: Callable[[str, Callable], Callable]) -> Iterator[None]:
    """Wrappers call `change(name, operator)` in the place of every operator of torch_npu."""
    found = gateway.fused
    gateway.fused = lambda name: change(name, found(name))
    try:
        yield
    finally:
        gateway.fused = found


def on_device(case: Case, inputs: Inputs, dtype: torch.dtype, device: str) -> Inputs:
    """The inputs of the check, those with gradients as leaves."""
    moved = {}
    for name, tensor in inputs.items():
        kind = torch.float32 if name in case.wide else dtype if tensor.is_floating_point() else tensor.dtype
        moved[name] = tensor.to(kind).to(device).requires_grad_(name in case.gradients)
    return moved


def rounded(case: Case, inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """The same numbers in float64: what the device was given, not what it was made of."""
    return {name: t.detach().double() if t.is_floating_point() else t for name, t in on_device(case, inputs, dtype, "cpu").items()}


def tuple_of(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def make(case: Case) -> Inputs:
    torch.manual_seed(sum(map(ord, case.name)))
    return case.inputs()


def compare(what: str, got: Tensor, want: Tensor, bound: float) -> None:
    assert got.shape == want.shape, f"{what}: shape {tuple(got.shape)}, not {tuple(want.shape)}"
    got = got.detach().cpu()
    if not want.is_floating_point():
        assert torch.equal(got, want), f"{what}: {got.tolist()}, not {want.tolist()}"
        return
    error = float((got.double() - want.double()).abs().max() / want.abs().max())
    assert error <= bound, f"{what}: off by {error:.1e} of the largest number, allowed {bound:.0e}"


def numerics(case: Case, dtype: torch.dtype) -> None:
    """The wrapper on the stand-in against the formula."""
    inputs = make(case)
    got = tuple_of(case.call(**on_device(case, inputs, dtype, "npu")))
    want = tuple_of(case.formula(**rounded(case, inputs, dtype)))
    assert len(got) == len(want)
    for number, (a, b) in enumerate(zip(got, want)):
        compare(f"{case.name} result {number}", a, b, ERRORS[dtype])


def gradients(case: Case, dtype: torch.dtype) -> None:
    """Gradients of all results, each times a random tensor, against those of the formula."""
    inputs = make(case)
    device, exact = on_device(case, inputs, dtype, "npu"), rounded(case, inputs, dtype)
    for name in case.gradients:
        exact[name].requires_grad_()
    found = []
    for tensors, formula in ((device, False), (exact, True)):
        outs = [x for x in tuple_of((case.formula if formula else case.call)(**tensors)) if x.requires_grad]
        torch.manual_seed(3)
        above = [torch.randn(x.shape, dtype=torch.float64).to(dtype) for x in outs]
        above = [x.to(out) for x, out in zip(above, outs)]
        found.append(torch.autograd.grad(outs, [tensors[name] for name in case.gradients], above))
    for name, got, want in zip(case.gradients, *found):
        assert got.dtype == device[name].dtype
        compare(f"{case.name} gradient of {name}", got, want, ERRORS[dtype])


def fake(case: Case, dtype: torch.dtype) -> None:
    """Shapes and dtypes forward and backward under FakeTensorMode on device npu, by the wheel's own meta kernels and autograd nodes."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    inputs = make(case)
    wanted = tuple_of(case.formula(**rounded(case, inputs, dtype)))
    triangle.cache_clear()
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            tensors = on_device(case, {name: torch.empty(t.shape, dtype=t.dtype, device="npu") for name, t in inputs.items()}, dtype, "npu")
            outs = tuple_of(case.call(**tensors))
            for out, want in zip(outs, wanted, strict=True):
                assert out.shape == want.shape, f"{case.name}: {tuple(out.shape)}, not {tuple(want.shape)}"
                assert out.device.type == "npu" and out.is_floating_point() == want.is_floating_point()
            if case.gradients:
                grads = torch.autograd.grad([x.sum() for x in outs if x.requires_grad], [tensors[name] for name in case.gradients])
                assert all(g.shape == tensors[name].shape for g, name in zip(grads, case.gradients))
    finally:
        triangle.cache_clear()


def run_through(case: Case, dtype: torch.dtype) -> None:
    """Forward and backward with whatever comes out: for the `host` column, where kernels leave memory as it is."""
    tensors = on_device(case, make(case), dtype, "npu")
    outs = [x for x in tuple_of(case.call(**tensors)) if x.requires_grad]
    if case.gradients:
        torch.autograd.grad([x.sum() for x in outs], [tensors[name] for name in case.gradients])


def recorded(case: Case) -> list[Seen]:
    """Every operator that a case calls, forward and backward, with the arguments as written."""
    found: list[Seen] = []

    def note(name: str, operator: Callable) -> Callable:
        def call(*args, **kwargs):
            found.append(Seen(name, args, kwargs))
            return operator(*args, **kwargs)

        return call

    with between(note):
        run_through(case, torch.float32)
    assert found, f"{case.name} calls no operator of torch_npu"
    return found


def host(script: str) -> dict[str, str]:
    """What torch_npu's own C++ says to calls: name -> refusal or nothing. `script`, beside this file, makes them without the stand-in."""
    environment = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).with_name(script))]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=400, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout[done.stdout.index("{") :])
