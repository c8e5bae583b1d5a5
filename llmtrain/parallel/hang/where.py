"""Where this process is in a step: a few numbers that the call sites keep up to date, for the report of a hang.

They lie in one block of memory that other processes can read (`parallel/hang/board.py`), so the place of a rank is known even when it is
stopped or gone. One record per process: a mark costs well below a microsecond.

On the CPU a rank waits inside its collectives: `recorded` around one, or `Begun` for one that is waited for later. On an asynchronous
device the host goes on, and waits where it reads a number from the device (`device_wait`), for whatever was begun before; which collective
that is comes out when the ranks compare how many they have begun (`parallel/hang/settle.py`).
"""

import time
from functools import partial

import torch.distributed as dist
from torch import Tensor, nn

from llmtrain.parallel.hang.record import BACKWARD, DEVICE, FORWARD, Field, Record

HERE = Record()
"""The record of this process."""
_labels: dict[str, str] = {}  # name of a process group -> name of its axis
_known: dict[tuple, tuple[int, int, int]] = {}  # a collective -> place of its count, numbers of op and group


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


def count(op: str, group: "dist.ProcessGroup | str", *, peer: int = -1) -> None:
    """Say that a collective begins that nothing here waits for; arguments as of `recorded`. All its ranks say so, in one order."""
    place, number, axis = _numbers(op, group, peer)
    slots = HERE.slots
    if place:
        slots[place] += 1
    HERE.begun.append((place, number, axis, peer, slots[Field.LAYER], slots[Field.DIRECTION], slots[Field.MICRO_BATCH]))
    slots[Field.CALLS] += 1
    slots[Field.MARKS] += 1


class recorded:
    """Context around a blocking collective: `with recorded("all_reduce", group): ...`.

    group: the process group, or the name of its axis. peer: global rank at the other end of a send or receive.
    begun: `count` was called when it began, and this is the wait for it.
    A collective that raises stays in the record, so that the report can name it.
    """

    __slots__ = ("before", "begun", "group", "op", "peer")

    def __init__(self, op: str, group: "dist.ProcessGroup | str", *, peer: int = -1, begun: bool = False):
        self.op, self.group, self.peer, self.begun = op, group, peer, begun

    def __enter__(self) -> None:
        if not self.begun:
            count(self.op, self.group, peer=self.peer)
        slots = HERE.slots
        self.before = slots[Field.OP], slots[Field.GROUP], slots[Field.PEER], slots[Field.SINCE]
        _, slots[Field.OP], slots[Field.GROUP] = _numbers(self.op, self.group, self.peer)
        slots[Field.PEER] = self.peer
        slots[Field.SINCE] = time.time_ns()
        slots[Field.MARKS] += 1

    def __exit__(self, kind: object, *_: object) -> None:
        slots = HERE.slots
        if kind is None:
            slots[Field.OP], slots[Field.GROUP], slots[Field.PEER], slots[Field.SINCE] = self.before
        slots[Field.MARKS] += 1


class device_wait(recorded):
    """Context in which the host reads from its device, and so waits for all that was begun: `with device_wait(): loss.item()`."""

    __slots__ = ()

    def __init__(self):
        super().__init__(DEVICE, "-", begun=True)

    def __exit__(self, kind: object, *rest: object) -> None:
        super().__exit__(kind, *rest)
        if kind is None:
            HERE.begun.clear()


class Begun:
    """A collective that has begun and is waited for later; counted when made, which comes first: `Begun(op, group).by(work)`."""

    __slots__ = ("group", "op", "peer", "works")

    def __init__(self, op: str, group: "dist.ProcessGroup | str", *, peer: int = -1):
        count(op, group, peer=peer)
        self.op, self.group, self.peer = op, group, peer

    def by(self, *works: dist.Work) -> "Begun":
        """The same, carried out by these."""
        self.works = works
        return self

    def wait(self) -> None:
        """Wait for it, on the record."""
        with recorded(self.op, self.group, peer=self.peer, begun=True):
            for work in self.works:
                work.wait()

    def is_completed(self) -> bool:
        """Whether there is nothing left to wait for."""
        return all(work.is_completed() for work in self.works)


def _numbers(op: str, group: "dist.ProcessGroup | str", peer: int) -> tuple[int, int, int]:
    """Where such collectives are counted, and the numbers of their op and group."""
    key = op, group if isinstance(group, str) else group.group_name, peer
    known = _known.get(key)
    if known is None:
        axis = group if isinstance(group, str) else label(group)
        place = 0 if op == DEVICE else HERE.count_of(axis if peer < 0 else _pair(op, axis, peer))
        known = _known[key] = place, HERE.number(op), HERE.number(axis)
    return known


def _pair(op: str, axis: str, peer: int) -> str:
    """Under which name both ends count what passes between them."""
    me = dist.get_rank() if dist.is_initialized() else 0
    if op in ("send", "recv"):
        return "{} {}>{}".format(axis, *((me, peer) if op == "send" else (peer, me)))
    return "{} {}={}".format(axis, *sorted((me, peer)))


def label(group: dist.ProcessGroup) -> str:
    """Name of the axis that `group` lies along."""
    return _labels.get(group.group_name, group.group_desc)


def set_labels(labels: dict[str, str]) -> None:
    """Give process groups (by `group_name`) the names of their axes."""
    _labels.clear()
    _labels.update(labels)
    _known.clear()


def watch_layers(model: nn.Module) -> None:
    """Mark the layer of `model` whose forward or backward pass begins. Call it after FSDP2 was applied, whose collectives then count
    for the layer that they are for."""
    for name, part in _layers(model).items():
        number = HERE.number(name)
        part.register_forward_pre_hook(partial(_enter, number), prepend=True)
        part.register_forward_hook(partial(_leave, partial(mark, number, BACKWARD)), prepend=True)


def ends(model: nn.Module) -> tuple[int, int]:
    """Numbers for `mark` of the first and the last layer of `model`, a pipeline stage; 0 without layers."""
    numbers = [HERE.number(name) for name in _layers(model)] or [0]
    return numbers[0], numbers[-1]


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    """The parts of `model` that are there, in order, by the names that reports give them."""
    parts = {"embedding": getattr(model, "embedding", None)}
    parts |= {f"block {name}": block for name, block in (getattr(model, "blocks", None) or {}).items()}
    parts |= {f"mtp {name}": module for name, module in (getattr(model, "mtp", None) or nn.Module()).named_children()}
    parts |= {"head": getattr(model, "head", None)}
    return {name: part for name, part in parts.items() if part is not None}


def mark(number: int, direction: int, *_: object) -> None:
    """Mark the layer of this number, and FORWARD or BACKWARD."""
    slots = HERE.slots
    slots[Field.LAYER], slots[Field.DIRECTION] = number, direction
    slots[Field.MARKS] += 1


def _enter(number: int, *_: object) -> None:
    mark(number, FORWARD)


def _leave(mark: partial, module: nn.Module, given: tuple, output: object) -> None:
    if isinstance(output, Tensor) and output.requires_grad:
        output.register_hook(mark)
