"""Times and errors of every implementation of an op that serves a call, at the user's own shapes."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from statistics import median
from typing import Any

import psutil
import torch
from torch import Tensor

from llmtrain.device import Device
from llmtrain.ops import Call, Implementation, Ops, choose, implementations
from llmtrain.tools.kernels_shape import Shape, case
from llmtrain.tools.progress import Progress
from llmtrain.tools.selftest.kernel_cases import Case
from llmtrain.tools.selftest.kernels_run import difference, evaluate

ERROR_TOKENS = 512
"""Tokens up to which errors are measured: the float64 reference holds all scores."""

SLOW = 20.0
"""Seconds of the first call from which an implementation is timed only once."""


@dataclass
class Row:
    """One implementation: times in seconds, errors relative to the norm of the float64 result, or why there are none.

    `error` is that of the output, `gradient_error` the largest of the gradients.
    """

    op: str
    name: str
    state: str = "available"
    why: str = ""
    forward: float | None = None
    backward: float | None = None
    error: float | None = None
    gradient_error: float | None = None
    flops: float | None = None
    """Of the forward pass, masked pairs not counted; attention only."""
    times: list[tuple[float, float]] = field(default_factory=list, repr=False)

    def public(self) -> dict[str, Any]:
        """For JSON."""
        return {name: value for name, value in asdict(self).items() if name != "times"}


def bench(ops: list[str], shape: Shape, call: Call, *, device: Device, rounds: int) -> list[Row]:
    """Rows of all ops, in the registry's order."""
    return [row for op in ops for row in _bench_op(op, shape, call, device, rounds)]


def _bench_op(op: str, shape: Shape, call: Call, device: Device, rounds: int) -> list[Row]:
    full, small = case(op, shape), case(op, shape.small(ERROR_TOKENS))
    call = replace(call, **full.facts)
    if not call.backward:
        full.grad = small.grad = ()
    rows = {entry.name: _row(entry, call, shape, device) for entry in implementations(op)}
    functions = {entry.name: _function(entry, call) for entry in implementations(op) if rows[entry.name].state != "refused"}
    _measure_errors(rows, functions, small, call)
    alive = {name: function for name, function in functions.items() if rows[name].state != "failed"}
    _measure_times(rows, alive, full, call, device, rounds)
    if op == "attention":
        for name in alive:
            rows[name].flops = 2.0 * shape.pairs() * shape.heads * (shape.head_dim + shape.value_head_dim)
    return list(rows.values())


def _row(entry: Implementation, call: Call, shape: Shape, device: Device) -> Row:
    """Whether it serves, and whether it is what `auto` takes. Raises KernelUnavailable if nothing serves."""
    chosen = choose(entry.op, call)
    if refusal := entry.refusal(call) or _too_large(entry, shape, device):
        return Row(entry.op, entry.name, "refused", refusal)
    return Row(entry.op, entry.name, "chosen", chosen.reason) if entry.name == chosen.name else Row(entry.op, entry.name)


@contextmanager
def _surviving(row: Row) -> Iterator[None]:
    """What goes wrong inside is said in the row, and the others go on."""
    try:
        yield
    except RuntimeError as error:
        short = "out of memory" if isinstance(error, torch.OutOfMemoryError) else str(error).partition("\n")[0]
        row.state, row.why, row.times = "failed", short, []


def _function(entry: Implementation, call: Call) -> Callable:
    wanted = {part: choose(part, call) for part in entry.parts} | {entry.op: choose(entry.op, call, entry.name)}
    return getattr(Ops(wanted), entry.op)


def _too_large(entry: Implementation, shape: Shape, device: Device) -> str | None:
    """Why the formula's S x T scores do not fit, kept for the backward pass with their exponentials and the mask."""
    if (entry.op, entry.name) != ("attention", "reference"):
        return None
    wanted = 3 * 4 * shape.batch * shape.heads * shape.seq_len**2
    free = psutil.virtual_memory().available if device.kind == "cpu" else device.memory().total - device.memory().allocated
    return f"would hold about {wanted / 2**30:.0f} GiB of scores" if wanted > free / 2 else None


def _measure_errors(rows: dict[str, Row], functions: dict[str, Callable], case: Case, call: Call) -> None:
    plain = next(entry for entry in implementations(case.name) if entry.speed == 0).function
    device = torch.device("cpu")
    exact = evaluate(case, plain, torch.float64, device, rounded=call.dtype)
    with Progress("errors", len(functions), "implementations") as progress:
        for done, (name, function) in enumerate(functions.items(), 1):
            with _surviving(rows[name]):
                ours = evaluate(case, function, call.dtype, torch.device(call.device))
                errors = {part: difference(value, exact[part]) for part, value in ours.items()}
                rows[name].error = max(error for part, error in errors.items() if not part.startswith("d "))
                rows[name].gradient_error = max((error for part, error in errors.items() if part.startswith("d ")), default=None)
            progress.at(done)


def _measure_times(rows: dict[str, Row], functions: dict[str, Callable], case: Case, call: Call, device: Device, rounds: int) -> None:
    """A first call of each, then rounds in which all are timed in turn: what else runs on the machine meets all alike."""
    tensors = _tensors(case, call, device)
    left = dict.fromkeys(functions, rounds)
    with Progress("timing", (rounds + 1) * len(functions), "calls") as progress:
        for number in range(rounds + 1):
            for place, name in enumerate(functions, 1):
                progress.at(number * len(functions) + place)
                if left[name] == 0:
                    continue
                seconds = None
                with _surviving(rows[name]):
                    seconds = _timed(functions[name], case, tensors, call, device)
                if seconds is None:
                    left[name] = 0
                elif number == 0:
                    left[name] = 1 if sum(seconds) > SLOW else rounds
                else:
                    left[name] -= 1
                    rows[name].times.append(seconds)
    for row in rows.values():
        if row.times:
            forward, backward = zip(*row.times)
            row.forward, row.backward = median(forward), median(backward) if call.backward else None


def _timed(function: Callable, case: Case, tensors: dict[str, Tensor], call: Call, device: Device) -> tuple[float, float]:
    """Seconds of a forward and a backward pass, 0 without one."""
    device.synchronize()
    start = time.perf_counter()
    outputs = list(case.call(function, tensors).values())
    device.synchronize()
    forward = time.perf_counter() - start
    if not call.backward:
        return forward, 0.0
    slopes = [torch.ones_like(x) for x in outputs]
    device.synchronize()
    start = time.perf_counter()
    torch.autograd.grad(outputs, [tensors[name] for name in case.grad], slopes)
    device.synchronize()
    return forward, time.perf_counter() - start


def _tensors(case: Case, call: Call, device: Device) -> dict[str, Tensor]:
    """The case's tensors on the device, in the dtype of the call."""
    made = {}
    for name, tensor in case.tensors.items():
        wide = torch.promote_types(call.dtype, torch.float32) if name in case.wide else call.dtype
        tensor = tensor.to(device.torch_device, wide if tensor.is_floating_point() else tensor.dtype)
        made[name] = tensor.requires_grad_(name in case.grad)
    return made
