"""Symbolic equality by the package `math-verify`, in a process of its own that is limited in time and memory.

Strings of models make computer algebra run for ever or fill the memory (9^{9^{9}}), in calls that no signal interrupts; so a child compares
and is killed when its time is up.
"""

import atexit
import importlib.util
import json
import os
import selectors
import subprocess
import sys
import threading

from llmtrain.errors import UserError

SECONDS = 5.0
START_SECONDS = 60.0
"""Until the child has imported the package."""


def available() -> bool:
    """Whether the package is installed."""
    return importlib.util.find_spec("math_verify") is not None


class Comparer:
    """A child process that compares LaTeX expressions; killed and started anew when one takes longer than `seconds`."""

    def __init__(self, seconds: float = SECONDS):
        self.seconds, self.timeouts = seconds, 0
        self._child: subprocess.Popen | None = None
        self._lock = threading.Lock()

    def same(self, given: str, expected: str) -> bool:
        """Whether both are the same; False if that cannot be found out in time. Raises UserError without the package."""
        if not available():
            needs = "comparing expressions needs math-verify: pip install 'llmtrain[math]'"
            raise UserError(f"the answer {expected!r} is no plain number, and {needs}")
        with self._lock:
            if self._child is None:
                self._start()
            answer = self._ask(json.dumps([given, expected]), self.seconds)
            if answer is None:
                self.timeouts += 1
                self.close()
            return answer == "true"

    def close(self) -> None:
        """End the child."""
        if self._child is not None:
            self._child.kill()
            self._child.communicate()
            self._child = None

    def _start(self) -> None:
        command = [sys.executable, "-m", "llmtrain.data.symbolic_child"]
        paths = os.pathsep.join(path for path in sys.path if path)
        self._child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=os.environ | {"PYTHONPATH": paths}
        )
        if self._ask(None, START_SECONDS) != "ready":
            self.close()
            raise UserError("math-verify is installed but cannot be used: its process did not start; try `python -c 'import math_verify'`")

    def _ask(self, line: str | None, seconds: float) -> str | None:
        """Send a line and wait for one; None if it does not come in time or the child has ended."""
        try:
            if line is not None:
                self._child.stdin.write(line.encode() + b"\n")
                self._child.stdin.flush()
        except BrokenPipeError:
            return None
        with selectors.DefaultSelector() as selector:
            selector.register(self._child.stdout, selectors.EVENT_READ)
            ready = selector.select(seconds)
        return self._child.stdout.readline().decode().strip() or None if ready else None


_SHARED = Comparer()
atexit.register(_SHARED.close)


def same(given: str, expected: str) -> bool:
    """`Comparer.same` of one that the whole process shares."""
    return _SHARED.same(given, expected)
