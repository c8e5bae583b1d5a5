"""Which collective this process waits in, and where its Python code stands, seen from another thread."""

import os
import sys
import threading
import time
import traceback
from pathlib import Path
from types import FrameType

import torch.distributed as dist

from llmtrain.compat import open_collectives
from llmtrain.layout.mesh import AXES
from llmtrain.parallel.hang.record import Field
from llmtrain.parallel.hang.where import HERE
from llmtrain.parallel.mesh import Mesh

INNERMOST = 5  # frames shown whatever they are; further out, those of this package alone
OUTER = 6
LIBRARY = os.path.dirname(dist.__file__)
# What of torch.distributed waits for other ranks; all else of it may work for long on its own, as when a checkpoint is read.
COLLECTIVES = tuple(os.path.join(LIBRARY, name) for name in ("distributed_c10d.py", "_functional_collectives.py", "fsdp/_fully_shard/"))
WRAPPERS = ("c10d_logger.py", "typing_extensions.py")
DULL = (*WRAPPERS, "_contextlib.py", "eval_frame.py", "_fsdp_common.py", os.path.join("hang", "where.py"))  # frames that only pass on
STANDARD = os.path.dirname(os.__file__)
PACKAGE = str(Path(__file__).parents[2]) + os.sep
ROOT = os.path.dirname(os.path.dirname(PACKAGE))


class Inside:
    """Looks for the collective that the main thread is in."""

    def __init__(self, mesh: Mesh):
        self.groups = named_groups(mesh)
        self._everyone = list(range(mesh.world))
        self._asynchronous = mesh.device.kind != "cpu"
        self._main = threading.main_thread().ident
        self._call: tuple | None = None
        self._call_since = 0.0

    def collective(self) -> dict | None:
        """The collective that is waited for: op, group, members, sequence, peer, seconds; None if there is none.

        The record knows what this package calls, on any back end. The flight recorder (gloo, NCCL) knows all there are and, on a device,
        which of several is not complete. The main thread's frames stand in where there is neither.
        """
        place, pending = HERE.read(), open_collectives()
        oldest = pending[0] if pending else None
        if place["op"] and (oldest is None or not self._asynchronous):
            found = {key: place[key] for key in ("op", "group", "peer", "since")}
            found["sequence"] = oldest["sequence"] if oldest and self._axis(oldest["group"]) == place["group"] else None
        elif oldest:
            found = {**oldest, "group": self._axis(oldest["group"])}
        else:
            found = self._by_frames()
        if found is None:
            return None
        return {"peer": -1, **found, "members": self._members(found["group"]), "seconds": (time.time_ns() - found["since"]) / 1e9}

    def notice(self) -> None:
        """Remember since when the main thread's frames have been in a collective. Costs some 0.1 ms; `collective` asks torch, too."""
        self._by_frames()

    def _by_frames(self) -> dict | None:
        frame, frames = sys._current_frames().get(self._main), []
        while frame is not None:
            frames.append(frame)
            frame = frame.f_back
        found, key = self._call_in(frames)
        key = key and (*key, HERE.slots[Field.MARKS])
        if key != self._call:
            self._call, self._call_since = key, time.time_ns()
        return found and {**found, "since": self._call_since}

    def _call_in(self, frames: list[FrameType]) -> tuple[dict | None, tuple | None]:
        """The collective that the innermost of `frames` (first) are in, and what tells this call from others."""
        calls = []
        for frame in frames:
            if frame.f_code.co_filename.startswith(COLLECTIVES):
                calls.append(frame)
            elif not frame.f_code.co_filename.endswith(WRAPPERS):
                break
        if not calls:
            return None, None
        values = (call.f_locals.get(name) for call in calls for name in ("group", "process_group"))
        group = next((value.group_name for value in values if isinstance(value, dist.ProcessGroup)), dist.group.WORLD.group_name)
        axis = self._axis(group)
        outer = [call for call in calls if call.f_code.co_filename.startswith(COLLECTIVES[:2])] or calls
        return {"op": outer[-1].f_code.co_name, "group": axis, "sequence": None}, (id(calls[-1]), calls[-1].f_lasti)

    def failed(self, error: BaseException) -> dict | None:
        """The collective that `error` came out of, as `collective` gives it, as far as it can be told."""
        place = HERE.read()
        if place["op"]:
            found = {key: place[key] for key in ("op", "group", "peer")}
        else:
            found, _ = self._call_in([frame for frame, _ in traceback.walk_tb(error.__traceback__)][::-1])
        return found and {"peer": -1, **found, "sequence": None, "members": self._members(found["group"])}

    def _axis(self, group: str) -> str:
        return self.groups[group][0] if group in self.groups else group

    def axes(self) -> dict[str, list[int]]:
        """The ranks of this rank's groups by axis, without `world`."""
        return {axis: ranks for axis, ranks in self.groups.values() if axis != "world"}

    def _members(self, axis: str) -> list[int] | None:
        return self._everyone if axis == "world" else next((ranks for name, ranks in self.groups.values() if name == axis), None)

    def frames(self) -> tuple[list[str], str]:
        """The main thread's frames, innermost first (`llmtrain/train/loop.py:97 in run`), and the innermost that is no library's."""
        return _telling(traceback.extract_stack(sys._current_frames()[self._main]))


def frames_of(error: BaseException) -> tuple[list[str], str]:
    """The same for the frames that `error` came through."""
    return _telling(traceback.extract_tb(error.__traceback__))


def all_stacks() -> str:
    """Python stacks of all other threads."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    frames: dict[int, FrameType] = sys._current_frames()
    frames.pop(threading.get_ident())
    return "\n".join(f"{names.get(ident, ident)}:\n{''.join(traceback.format_stack(frame))}" for ident, frame in frames.items())


def failed_in_collective(error: BaseException) -> bool:
    """Whether `error` came out of a collective, by its type or by where it was raised."""
    if isinstance(error, dist.DistError):
        return True
    last = [frame.filename for frame in traceback.extract_tb(error.__traceback__)][-3:]
    inside = HERE.slots[Field.OP] != 0 or any(file.startswith(COLLECTIVES) for file in last) or "/gloo/" in str(error)
    return type(error) is RuntimeError and inside


def named_groups(mesh: Mesh) -> dict[str, tuple[str, list[int]]]:
    """Name of each process group of this rank -> its axis and its ranks. A group that several axes share has all their names."""
    parts = [(axis, mesh.device_mesh.get_group(axis)) for axis in AXES]
    if mesh.experts is not None:
        parts += [(axis, mesh.expert_group(axis)) for axis in mesh.shape.expert_axes]
    parts += [("fsdp", mesh.fsdp.get_group()), ("world", dist.group.WORLD)]
    axes: dict[str, list[str]] = {}
    members = {}
    for axis, group in parts:
        known = axes.setdefault(group.group_name, [])
        if not known or (group.size() > 1 and axis not in ("fsdp", "world")):
            known.append(axis)
        members[group.group_name] = dist.get_process_group_ranks(group)
    return {name: ("/".join(known), members[name]) for name, known in axes.items() if len(members[name]) > 1}


def _telling(stack: traceback.StackSummary) -> tuple[list[str], str]:
    frames = [frame for frame in reversed(stack) if not frame.filename.endswith(DULL)]
    ours = [frame for frame in frames[INNERMOST:] if frame.filename.startswith(PACKAGE)]
    installed = os.sep + "site-packages" + os.sep
    own = next((frame for frame in frames if installed not in frame.filename and not frame.filename.startswith((STANDARD, "<"))), None)
    lines = [_line(frame) for frame in frames[:INNERMOST]] + ["..."] * bool(frames[INNERMOST:]) + [_line(frame) for frame in ours[:OUTER]]
    return lines, _line(own or frames[0]) if frames else ""


def _line(frame: traceback.FrameSummary) -> str:
    file = frame.filename.rpartition(f"{os.sep}site-packages{os.sep}")[2]
    short = os.path.relpath(file, ROOT) if file.startswith(ROOT + os.sep) else file
    return f"{short}:{frame.lineno} in {frame.name}"
