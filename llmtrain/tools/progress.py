"""A line on stderr that says how far a long evaluation is and when it will be done."""

import sys
import time


class Progress:
    """`with Progress("scoring", total, "items") as p: ... p.at(n)`: silent for the first seconds, then at most a line a second.

    On a terminal the line is rewritten in place; elsewhere one is printed every half minute.
    """

    def __init__(self, what: str, total: int, unit: str):
        self.what, self.total, self.unit = what, total, unit
        self._live = sys.stderr.isatty()
        self._started = self._last = time.monotonic()
        self._shown = False

    def at(self, done: int) -> None:
        """Say that `done` of the total are ready."""
        now = time.monotonic()
        if now - self._last < (1 if self._live else 30) or now - self._started < 3:
            return
        self._last, elapsed = now, now - self._started
        rest = elapsed / max(done, 1) * (self.total - done)
        line = f"{self.what}: {done:,} of {self.total:,} {self.unit}, {elapsed:.0f} s, about {rest:.0f} s to go"
        print(f"\r\x1b[K{line}" if self._live else line, end="" if self._live else "\n", file=sys.stderr, flush=True)
        self._shown = True

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self._shown and self._live:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
