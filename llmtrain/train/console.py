"""The live progress line of rank 0, and messages above it."""

import atexit
import math
import os
import shutil
import sys
import time
from collections.abc import Callable
from typing import TextIO

from llmtrain.train.metrics import worst

ERASE_LINE = "\r\x1b[2K"


class Console:
    """Writes to `stream` (stdout): on a terminal one line that is rewritten, else a line every `seconds` and at the first and last step.

    `enabled=False`, on ranks other than 0, writes nothing.
    """

    def __init__(
        self, *, enabled: bool = True, stream: TextIO | None = None, seconds: float = 10.0, clock: Callable[[], float] = time.monotonic
    ):
        self.enabled = enabled
        self._stream = stream if stream is not None else sys.stdout
        self._live = enabled and self._stream.isatty() and os.environ.get("TERM") != "dumb"
        self._seconds, self._clock = seconds, clock
        self._line = ""  # the live line now on the screen
        self._last: float | None = None
        if self._live:
            atexit.register(self.close)

    def progress(self, *, step: int, total: int, values: dict, eta: float | None) -> None:
        """Show step `step` of `total`; `values` as in metrics.jsonl, `eta` in seconds."""
        if not self.enabled:
            return
        line = progress_line(step=step, total=total, values=values, eta=eta)
        now = self._clock()
        if self._live:
            if step == total or self._last is None or now - self._last >= 0.1:
                self._line, self._last = line, now
                self._draw()
            if step == total:
                self.close()
        elif step == total or self._last is None or now - self._last >= self._seconds:
            self._last = now
            self._write(line + "\n")

    def message(self, text: str) -> None:
        """Print `text` on lines of its own, above the live line."""
        if not self.enabled:
            return
        self._write((ERASE_LINE if self._line else "") + text + "\n")
        if self._line:
            self._draw()

    def close(self) -> None:
        """Leave the live line as it is and go on below it."""
        if self._line:
            self._line = ""
            self._write("\n")

    def _draw(self) -> None:
        width = shutil.get_terminal_size().columns - 1
        self._write(ERASE_LINE + self._line[:width])

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


def progress_line(*, step: int, total: int, values: dict, eta: float | None) -> str:
    """One line: step, ETA, loss, gradient norm, learning rate, tokens/s, MFU, memory, and of experts the worst layer's load, entropy and
    dropped share, as far as `values` has them."""
    parts = [
        f"step {step:>{len(str(total))}}/{total}",
        f"loss {values['loss']:.4f}",
        f"grad {values['grad_norm']:.3g}",
        f"lr {values['lr']:.2e}",
    ]
    parts.append(f"{short_count(values['tokens_per_second'])} tok/s")
    if values.get("mfu") is not None:
        parts.append(f"MFU {100 * values['mfu']:.1f}%")
    if values.get("memory_gb"):
        parts.append(f"mem {values['memory_gb']:.2f}G")
    parts += [f"{name} {value:.3g}" for name, value in worst(values.get("experts")).items()]
    parts += [name for name in ("spike", "skipped") if values.get(name)]
    if eta is not None:
        parts.insert(1, f"ETA {duration(eta)}")  # a narrow terminal cuts the end of the line
    return "  ".join(parts)


def short_count(number: float) -> str:
    """1234 -> 1.23k, three digits."""
    if not math.isfinite(number):
        return str(number)
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= limit * 0.9995:
            return f"{number / limit:#.3g}".rstrip(".") + unit
    return f"{number:.3g}"


def duration(seconds: float) -> str:
    """Seconds as `1d 03:04:05` or `04:05`."""
    if not math.isfinite(seconds):
        return "unknown"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    clock = f"{minutes:02d}:{rest:02d}" if not (hours or days) else f"{hours:02d}:{minutes:02d}:{rest:02d}"
    return f"{days}d {clock}" if days else clock
