"""What a part of a model does: operators with their FLOPs, bytes and kernels, and collectives. No times.

In `blocks.py`, `mixtures.py` and here: T tokens of a micro-batch on a rank of cp, T / t on a rank of tp where sequence parallelism splits
what lies between the branches; D hidden; e bytes of an activation.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

from llmtrain.simulate.case import LOW, Case

GROUPED, PRODUCT, ATTENTION, PASS = "grouped", "product", "attention", "pass"


class Item(NamedTuple):
    """One operator, `count` times."""

    name: str
    kind: str
    """`product`, `grouped` (as many products of experts at once), `attention`, `pass` (bound by memory)."""
    flops: float = 0.0
    bytes: float = 0.0
    launches: float = 1
    low: bool = False
    """Whether it is computed in fp8 where the case says so."""
    backward: bool = False


class Send(NamedTuple):
    """One collective of `size` bytes (see `layout.traffic.sent`) over an axis."""

    name: str
    kind: str
    axis: str
    size: float
    hides: str
    """What it may hide beside: `tp`, `cp`, `ep`, or `` for nothing."""


@dataclass
class Work:
    """What a part of the model does for one micro-batch on one rank."""

    forward: list[Item] = field(default_factory=list)
    inputs: list[Item] = field(default_factory=list)
    """Of the backward pass, what gives gradients of inputs."""
    weights: list[Item] = field(default_factory=list)
    again: list[Item] = field(default_factory=list)
    """What the backward pass computes again."""
    forward_sends: list[Send] = field(default_factory=list)
    backward_sends: list[Send] = field(default_factory=list)
    again_sends: list[Send] = field(default_factory=list)

    def product(
        self, name: str, *, m: float, n: float, k: float, count: int = 1, case: Case, kind: str = PRODUCT, low: bool = True
    ) -> None:
        """[m,k] by [k,n], `count` times, with both products of its backward pass; weights' gradients are added up in place."""
        e, low, padded = case.width, low and case.dtype in LOW, _padded(m, n, k)
        flops, moved = 2.0 * padded * count, e * (m * k + k * n + m * n) * count
        self.forward.append(Item(name, kind, flops, moved, 1, low))
        self.inputs.append(Item(name, kind, flops, moved, 1, low, True))
        update = 2.0 * case.habits.gradient_bytes * k * n * count
        self.weights.append(Item(name, kind, flops, e * (m * k + m * n) * count + update, 1, low, True))
        if low:  # activations and gradients in two layouts each, from 16 bits
            cast = 2 + 2 * 1.0
            self.forward.append(Item("casts", PASS, bytes=m * k * cast * count, launches=1))
            self.inputs.append(Item("casts", PASS, bytes=m * n * cast * count, launches=1))

    def passes(self, name: str, *, forward: float, backward: float, case: Case, launches: int = 1) -> None:
        """Element-wise work that moves so many bytes."""
        self.forward.append(Item(name, PASS, bytes=forward, launches=launches))
        self.inputs.append(Item(name, PASS, bytes=backward, launches=launches, backward=True))

    def send(self, name: str, kind: str, axis: str, size: float, hides: str = "", *, back: str | None = None, after: str = "") -> None:
        """A collective of the forward pass, and its mirror image `back` in the backward pass, which may hide beside something else."""
        self.forward_sends.append(Send(name, kind, axis, size, hides))
        self.backward_sends.append(Send(name, back or kind, axis, size, after or hides))


def _padded(m: float, n: float, k: float) -> float:
    """m n k as tiles of 128 rows and units of 16 columns compute them."""
    return -(-m // 16) * 16 * (-(-n // 16) * 16) * (-(-k // 16) * 16)
