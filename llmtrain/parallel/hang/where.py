"""Where this process is in a step: a few numbers that the call sites keep up to date, for the report of a hang.

They lie in one block of memory that other processes can read (`parallel/hang/board.py`), so the place of a rank is known even when it is
stopped or gone. One record per process: a mark costs well below a microsecond.
"""

import time
from functools import partial

import torch.distributed as dist
from torch import Tensor, nn

from llmtrain.parallel.hang.record import BACKWARD, FORWARD, Field, Record

HERE = Record()
"""The record of this process."""
_labels: dict[str, str] = {}  # name of a process group -> name of its axis


def at(*, step: int | None = None, phase: str | None = None, micro_batch: int | None = None) -> None:
    """Mark where the run is: `step` counted from 1, `phase` in a word or two, `micro_batch` of the step from 0 (-1: none)."""
    slots = HERE.slots
    if step is not None:
        slots[Field.STEP] = step
    if phase is not None:
        slots[Field.PHASE] = HERE.number(phase)
        slots[Field.LAYER] = slots[Field.DIRECTION] = 0
    if phase is not None or micro_batch is not None:
        slots[Field.MICRO_BATCH] = -1 if micro_batch is None else micro_batch
    slots[Field.MARKS] += 1


class recorded:
    """Context around a blocking collective, or around the wait for one: `with recorded("all_reduce", group): ...`.

    group: the process group, or the name of its axis. peer: global rank at the other end of a send or receive.
    A collective that raises stays in the record, so that the report can name it.
    """

    __slots__ = ("before", "group", "op", "peer")

    def __init__(self, op: str, group: "dist.ProcessGroup | str", *, peer: int = -1):
        self.op, self.group, self.peer = op, group, peer

    def __enter__(self) -> None:
        slots = HERE.slots
        self.before = slots[Field.OP], slots[Field.GROUP], slots[Field.PEER], slots[Field.SINCE]
        slots[Field.OP] = HERE.number(self.op)
        slots[Field.GROUP] = HERE.number(self.group if isinstance(self.group, str) else label(self.group))
        slots[Field.PEER] = self.peer
        slots[Field.SINCE] = time.time_ns()
        slots[Field.CALLS] += 1
        slots[Field.MARKS] += 1

    def __exit__(self, kind: object, *_: object) -> None:
        slots = HERE.slots
        if kind is None:
            slots[Field.OP], slots[Field.GROUP], slots[Field.PEER], slots[Field.SINCE] = self.before
        slots[Field.MARKS] += 1


def label(group: dist.ProcessGroup) -> str:
    """Name of the axis that `group` lies along."""
    return _labels.get(group.group_name, group.group_desc)


def set_labels(labels: dict[str, str]) -> None:
    """Give process groups (by `group_name`) the names of their axes."""
    _labels.clear()
    _labels.update(labels)


def watch_layers(model: nn.Module) -> None:
    """Mark the layer of `model` whose forward or backward pass begins. Call it after FSDP2 was applied, whose collectives then count
    for the layer that they are for."""
    parts = {name: getattr(model, name, None) for name in ("embedding", "head")}
    parts |= {f"block {name}": block for name, block in model.blocks.items()}
    parts |= {f"mtp {name}": module for name, module in getattr(model, "mtp", None).named_children()} if getattr(model, "mtp", None) else {}
    for name, part in parts.items():
        if part is not None:
            number = HERE.number(name)
            part.register_forward_pre_hook(partial(_enter, number), prepend=True)
            part.register_forward_hook(partial(_leave, partial(_mark, number, BACKWARD)), prepend=True)


def _mark(number: int, direction: int, *_: object) -> None:
    slots = HERE.slots
    slots[Field.LAYER], slots[Field.DIRECTION] = number, direction
    slots[Field.MARKS] += 1


def _enter(number: int, *_: object) -> None:
    _mark(number, FORWARD)


def _leave(mark: partial, module: nn.Module, given: tuple, output: object) -> None:
    if isinstance(output, Tensor) and output.requires_grad:
        output.register_hook(mark)
