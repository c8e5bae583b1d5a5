"""How far a side is from float64, and how far honest rounding may be.

A trace is measured against the same step in float64 on the CPU with the reference kernels. The control is that step in the side's
compute format, again on the CPU with the reference kernels: it rounds as often as the side does, so its distance from float64 is what the
format costs at that place of this model.
"""

from dataclasses import replace

import torch

from llmtrain.config.run import RunConfig
from llmtrain.config.train import NativeEngineConfig, PrecisionConfig
from llmtrain.device import select
from llmtrain.ops import implementations, op_names
from llmtrain.stages.session import op_call
from llmtrain.tools.compare.side import Side
from llmtrain.tools.compare.trace import BACKWARD, FORWARD, WEIGHTS, Point, Trace

LONGEST = 2048  # tokens up to which the reference attention, which builds an S x S mask, is used
VANISHING = 1e-6


def on_cpu(side: Side, compute: str) -> Side:
    """The step of `side` on the CPU with the native engine and reference kernels in the format `compute`; fp64 is the reference itself."""
    precision = {key: "fp64" for key in PrecisionConfig.model_fields if key != "loss_scale"} if compute == "fp64" else {"compute": compute}
    cfg = side.cfg.model_copy(
        update={
            "device": "cpu",
            "engine": NativeEngineConfig(),
            "precision": PrecisionConfig.model_validate({**precision, "loss_scale": side.cfg.precision.loss_scale}),
            "train": side.cfg.train.model_copy(update={"compile": "off"}),
        }
    )
    cfg = cfg.model_copy(update={"kernels": _reference_kernels(cfg, side.step.seq_len)})
    return replace(side, cfg=cfg, words=f"{compute} on the CPU, reference kernels")


def _reference_kernels(cfg: RunConfig, seq_len: int) -> dict[str, str]:
    """Per op the implementation of speed 0, the plain formula, where it serves the call."""
    call = op_call(cfg, select("cpu"))
    plain = {op: entry.name for op in op_names() for entry in implementations(op) if entry.speed == 0 and entry.refusal(call) is None}
    return plain if seq_len <= LONGEST else {op: name for op, name in plain.items() if op != "attention"}


def measure(trace: Trace, *, reference: Trace, control: Trace) -> None:
    """Fill `off`, `control`, `moved` and `unjudged` of the trace's points in place."""
    exact, rounded, least = reference.by_key(), control.by_key(), scales(reference)
    astray = None  # why later points mean nothing
    for point in trace.points:
        truth, honest = exact.get(point.key), rounded.get(point.key)
        if truth is None or honest is None or truth.shape != point.shape:
            point.unjudged = "the reference has no such point" if truth is None else f"the reference has shape {list(truth.shape)}"
        elif not point.is_float:
            point.moved, point.moved_control = moved(point, truth), moved(honest, truth)
            if point.moved or point.moved_control:
                count = max(point.moved, point.moved_control)
                tokens = point.shape[0] if point.shape else 1
                astray = astray or f"from {point.name} on {count} of {tokens:,} tokens go to other experts, here or in the control run"
        else:
            point.unjudged = astray if point.phase != WEIGHTS else None
            point.off, point.control = distance(point, truth, least), distance(honest, truth, least)


def moved(point: Point, truth: Point) -> int:
    """Tokens whose set of experts [N,k] is another one."""
    mine, theirs = (p.values.view(p.shape).sort(-1).values for p in (point, truth))
    return int((mine != theirs).any(-1).sum())


def distance(point: Point, truth: Point, least: dict[str, float]) -> float:
    """|point - truth| / |truth| over the values kept; infinite where only one of them is finite.

    A tensor that vanishes beside the others of its phase (the gradient of a key's bias, which is zero but for rounding) is measured
    against VANISHING times the largest of them.
    """
    mine, theirs = point.values.double(), truth.values.double()
    if not torch.equal(mine.isfinite(), theirs.isfinite()) or point.bad != truth.bad:
        return float("inf")
    keep = theirs.isfinite()
    difference = (mine[keep] - theirs[keep]).norm().item()
    norm = max(theirs[keep].norm().item(), least[point.phase] * max(1, theirs.numel()) ** 0.5)
    return difference / norm if difference else 0.0


def scales(trace: Trace) -> dict[str, float]:
    """Per phase the root mean square below which a tensor counts as vanishing; a little above zero in any case."""
    found = {}
    for phase in (WEIGHTS, FORWARD, BACKWARD):
        roots = [_root_mean_square(p) for p in trace.points if p.phase == phase and p.is_float and p.shape]
        found[phase] = max(VANISHING * max((r for r in roots if r < float("inf")), default=0.0), 1e-300)
    return found


def _root_mean_square(point: Point) -> float:
    values = point.values.double()
    values = values[values.isfinite()]
    return values.square().mean().sqrt().item() if values.numel() else 0.0
