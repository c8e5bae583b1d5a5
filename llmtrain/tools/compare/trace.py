"""What a recorded step holds: points in execution order, each with some of a tensor's values; and the file that they are kept in."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from llmtrain.errors import UserError

FORMAT = 1
KEY = "llmtrain.compare"
WEIGHTS, FORWARD, BACKWARD = "weights", "forward", "backward"


@dataclass
class Point:
    """One tensor of the step.

    `off` is its distance from the same tensor in float64, relative to that tensor's norm, and `control` that of honest rounding in the
    side's compute format; None where no reference was run. `unjudged` says why these two mean nothing here.
    """

    name: str
    phase: str
    shape: tuple[int, ...]
    dtype: str
    values: Tensor = field(repr=False)
    """At most the trace's limit of them, spread evenly: `positions`."""
    bad: int = 0
    """NaN and infinities among all values of the tensor."""
    first_bad: tuple[int, ...] | None = None
    op: str | None = None
    off: float | None = None
    control: float | None = None
    moved: int | None = None
    """Tokens that a router sends to other experts than the reference does; `moved_control` in the control run."""
    moved_control: int | None = None
    unjudged: str | None = None

    @property
    def key(self) -> tuple[str, str]:
        """What the same point of another trace has in common with it."""
        return self.phase, self.name

    @property
    def is_float(self) -> bool:
        """Whether it holds numbers to be compared by distance, not choices."""
        return self.values.is_floating_point()


@dataclass
class Trace:
    """The points of one side in execution order, and what the side was: device, kernels, configuration, batch."""

    points: list[Point]
    meta: dict[str, Any]

    def by_key(self) -> dict[tuple[str, str], Point]:
        """Points by phase and name."""
        return {point.key: point for point in self.points}

    def save(self, path: Path) -> None:
        """Write a safetensors file whose metadata is JSON; nothing in it can run code. Raises UserError if it cannot be written."""
        described = [{key: value for key, value in vars(point).items() if key != "values"} for point in self.points]
        text = json.dumps({"format": FORMAT, "meta": self.meta, "points": described})
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file({str(i): point.values.contiguous() for i, point in enumerate(self.points)}, path, metadata={KEY: text})
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} cannot be written: {error}; choose another --out") from error


def load_trace(path: Path) -> Trace:
    """A trace as `Trace.save` wrote it. Raises UserError if the file is missing, damaged, or something else."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; `llmtrain compare record -c FILE --out {path}` makes one")
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(KEY)
            if text is None:
                raise UserError(f"{path} is no record of `llmtrain compare record`: it lacks the entry {KEY}")
            stored = json.loads(text)
            if stored.get("format") != FORMAT:
                found = stored.get("format")
                raise UserError(f"{path} has format {found}; this version reads {FORMAT}: record it again with this version of llmtrain")
            return Trace([_point(given, file.get_tensor(str(i))) for i, given in enumerate(stored["points"])], stored["meta"])
    except (SafetensorError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read: {error}; it is damaged, or no record of `llmtrain compare record`") from error


def _point(given: dict[str, Any], values: Tensor) -> Point:
    first = given["first_bad"]
    return Point(**{**given, "shape": tuple(given["shape"]), "first_bad": None if first is None else tuple(first)}, values=values)


def make_point(name: str, phase: str, tensor: Tensor, *, limit: int, op: str | None = None, scale: float = 1.0) -> Point:
    """A point of `tensor`, whose values are divided by `scale` (a loss scale). `limit` 0 keeps all of them."""
    flat = tensor.detach().reshape(-1)
    bad, first = 0, None
    if flat.is_floating_point():
        finite = flat.isfinite()
        bad = int((~finite).sum())
        if bad:
            index = (~finite).to(torch.uint8).cpu().argmax()
            first = tuple(int(i) for i in torch.unravel_index(index, tensor.shape)) if tensor.ndim else ()
        at = positions(flat.numel(), limit)
        flat = flat if at is None else flat[at.to(flat.device)]
    values = flat.cpu().clone()
    values = values if scale == 1.0 else values / scale
    return Point(name, phase, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), values, bad, first, op)


def positions(count: int, limit: int) -> Tensor | None:
    """Which of `count` values are kept: `limit` of them, one out of each of as many equal stretches; None for all.

    Its place in the stretch moves along by the golden ratio, so that the columns of a matrix are all met whatever its width is.
    """
    if not limit or count <= limit:
        return None
    step = torch.arange(limit, dtype=torch.float64)
    return ((step + (step * 0.6180339887498949).frac()) * (count / limit)).long().clamp_(max=count - 1)
