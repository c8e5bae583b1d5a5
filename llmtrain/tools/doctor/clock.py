"""Clocks: of nodes against rank 0 when launched on several, of this machine against the file system's otherwise."""

import os
import tempfile
import time
from pathlib import Path

from llmtrain.tools.doctor.machine import Line, Verdict

WORTH_A_NOTE = 1.0  # seconds from which the logs of two nodes cannot be laid side by side
TOO_MUCH = 30.0  # seconds from which file times mislead caches, and tickets and tokens expire early
FIX = "Run a time service on every node (`chronyc tracking`, `timedatectl`)"


def verdict(name: str, seconds: float, *, precision: float) -> Line:
    """The line for a clock that is `seconds` ahead, known to `precision`."""
    text = f"{seconds:+.3f} s, known to {precision:.3f} s"
    size = abs(seconds) - precision
    if size > TOO_MUCH:
        return Line("clock", name, Verdict.WRONG, text, FIX)
    return Line("clock", name, Verdict.NOTE if size > WORTH_A_NOTE else Verdict.OK, text, FIX if size > WORTH_A_NOTE else "")


def file_system(folder: Path) -> Line:
    """The clock that stamps files in `folder` (a server's, on a network file system) against this machine's."""
    name = "files in this folder"
    try:
        handle, path = tempfile.mkstemp(prefix=".llmtrain-doctor-", dir=folder)
    except OSError as error:
        return Line("clock", name, Verdict.NOTE, f"not known, {folder} cannot be written: {error.strerror}")
    try:
        before = time.time()
        os.write(handle, b"x")
        os.fsync(handle)
        after = time.time()
        stamped = os.fstat(handle).st_mtime
    finally:
        os.close(handle)
        os.unlink(path)
    # The kernel stamps files with a clock of 4 to 10 ms steps.
    return verdict(name, stamped - (before + after) / 2, precision=(after - before) / 2 + 0.01)
