"""A rank of llmtrain in which one rank misbehaves just before a collective of one axis.

LLMTRAIN_FAULT holds JSON: {"axis", "act"} and the keyword arguments of fail_in, and "blind": true for a torch without a flight recorder.
Run in the place of `python -m llmtrain`.
"""

import functools
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable

import torch.distributed as dist

from llmtrain.parallel.hang import inside as hang_inside
from llmtrain.parallel.hang import where
from llmtrain.parallel.hang.where import HERE, label

COLLECTIVES = (
    "all_reduce",
    "all_gather_into_tensor",
    "all_gather_single",
    "all_gather_object",
    "reduce_scatter_tensor",
    "reduce_scatter_single",
    "all_to_all_single",
    "batch_isend_irecv",
    "broadcast",
    "send",
    "recv",
)


ALL = -1


class Done:
    """The work of a collective that an asynchronous device will never come to; the host does not wait for it."""

    def wait(self, *_: object) -> bool:
        return True

    def is_completed(self) -> bool:
        return False


class Due:
    """Whether the collective has come at which the fault is."""

    def __init__(self, axis: str, *, step: int, direction: str | None, op: str | None, inside: str | None, nth: int):
        self.axis, self.step, self.direction, self.op, self.inside, self.left = axis, step, direction, op, inside, nth

    def now(self, name: str, group: dist.ProcessGroup | str | None) -> bool:
        group = (label(group) if group is not None else "world") if not isinstance(group, str) else group
        if self.axis not in group.split("/") or self.op not in (None, name):
            return False
        here = HERE.read()
        if here["step"] < self.step or self.direction not in (None, here["direction"]) or not self._called_by():
            return False
        self.left -= 1
        return self.left == 0

    def _called_by(self) -> bool:
        frame = sys._getframe()
        while self.inside is not None and frame is not None and frame.f_code.co_name != self.inside:
            frame = frame.f_back
        return frame is not None


def fail_in(
    axis: str,
    act: Callable[[], None],
    *,
    step: int,
    rank: int,
    direction: str | None = None,
    op: str | None = None,
    inside: str | None = None,
    nth: int = 1,
    asynchronous: bool = False,
) -> None:
    """On `rank`, call `act` once before the nth collective of `axis` (or "world") in or after `step`.

    direction: count only those in forward or in backward passes. op: only this function of torch.distributed, or those that the record
    calls so. inside: only where a function of this name is among the callers.
    asynchronous: the other ranks go on as the hosts of devices that stand still at this collective, until they read from their device.
    """
    due = Due(axis, step=step, direction=direction, op=op, inside=inside, nth=nth)
    here, stuck = rank in (int(os.environ["RANK"]), ALL), []

    def consider(name: str, group: dist.ProcessGroup | str | None) -> None:
        if due.now(name, group):
            act() if here else stuck.append(asynchronous)

    def wrap(function: Callable) -> Callable:
        @functools.wraps(function)
        def wrapped(*args, **kwargs):
            several = function.__name__ == "batch_isend_irecv"
            if HERE.read()["op"] is None:  # else it was considered when it was recorded
                consider(function.__name__, args[0][0].group if several else kwargs.get("group"))
            if any(stuck):
                return [Done()] if several else Done()
            return function(*args, **kwargs)

        return wrapped

    for name in COLLECTIVES:
        if hasattr(dist, name):
            setattr(dist, name, wrap(getattr(dist, name)))
    count, enter = where.count, where.recorded.__enter__
    where.count = lambda op, group, **more: (consider(op, group), count(op, group, **more))[1]
    where.device_wait.__enter__ = lambda self: (enter(self), any(stuck) and _sleep())[0]


def _sleep() -> None:
    time.sleep(600)


def _pause() -> None:
    time.sleep(16)


def _stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _raise() -> None:
    raise KeyError("a fault of this rank alone")


def _hold() -> None:
    """Compute in C without letting other Python threads run."""
    re.match(r"(a+)+$", "a" * 60 + "b")


ACTS = {"sleep": _sleep, "pause": _pause, "stop": _stop, "die": _die, "raise": _raise, "hold": _hold}

if __name__ == "__main__":
    from llmtrain.cli import main

    fault = json.loads(os.environ["LLMTRAIN_FAULT"])
    if fault.pop("blind", False):
        hang_inside.open_collectives = list
    fail_in(fault.pop("axis"), ACTS[fault.pop("act")], **fault)
    sys.exit(main())
