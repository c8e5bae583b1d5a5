"""A rank of llmtrain in which one rank misbehaves just before a collective of one axis.

LLMTRAIN_FAULT holds JSON: {"axis", "act"} and the keyword arguments of fail_in. Run in the place of `python -m llmtrain`.
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

from llmtrain.parallel.hang.where import HERE, label, recorded

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


def fail_in(axis: str, act: Callable[[], None], *, step: int, rank: int, direction: str | None = None, op: str | None = None) -> None:
    """On `rank`, call `act` once before the first collective of `axis` (or "world") in or after `step`.

    direction: only in forward or in backward passes. op: only before this function of torch.distributed.
    """
    if rank not in (int(os.environ["RANK"]), ALL):
        return
    done = []

    def consider(name: str, group: dist.ProcessGroup | str | None) -> None:
        group = (label(group) if group is not None else "world") if not isinstance(group, str) else group
        here = HERE.read()
        due = axis in group.split("/") and here["step"] >= step and direction in (None, here["direction"]) and op in (None, name)
        if due and not done:
            done.append(True)
            act()

    def wrap(function: Callable) -> Callable:
        @functools.wraps(function)
        def wrapped(*args, **kwargs):
            consider(function.__name__, args[0][0].group if function.__name__ == "batch_isend_irecv" else kwargs.get("group"))
            return function(*args, **kwargs)

        return wrapped

    for name in COLLECTIVES:
        if hasattr(dist, name):
            setattr(dist, name, wrap(getattr(dist, name)))
    enter = recorded.__enter__
    recorded.__enter__ = lambda self: (consider(self.op, self.group), enter(self))[1]


def sleep_in(axis: str, *, step: int, rank: int, direction: str | None = None) -> None:
    """`rank` sleeps before a collective of `axis`; see fail_in."""
    fail_in(axis, _sleep, step=step, rank=rank, direction=direction)


def _sleep() -> None:
    time.sleep(600)


def _pause() -> None:
    time.sleep(12)


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
    fail_in(fault.pop("axis"), ACTS[fault.pop("act")], **fault)
    sys.exit(main())
