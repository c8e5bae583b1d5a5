"""How fast a run is."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class SpeedMeter:
    """Tokens per second, MFU and time left, from step to step, without the time spent in `pause()` (validation, checkpoints).

    A step lasts from the end of the one before, so waiting for data counts. `peak_flops` (FLOP/s of one rank; None: no MFU) and `ranks`
    define MFU = model FLOP/s / (peak x ranks). `window` is the number of steps averaged over.
    """

    def __init__(self, *, peak_flops: float | None, ranks: int, window: int = 20, clock: Callable[[], float] = time.perf_counter):
        self._peak = peak_flops * ranks if peak_flops else None
        self._clock = clock
        self._window: deque[tuple[float, int, float]] = deque(maxlen=window)  # seconds, tokens, FLOPs
        self._mark: float | None = None
        self._paused = 0.0
        self.total_seconds = 0.0
        """Seconds of all steps, pauses left out."""
        self.total_tokens = 0
        """Tokens of all steps since this process started."""
        self.paused_seconds = 0.0
        """Seconds of all pauses."""

    def start_step(self) -> None:
        """A step begins; only the first call, which starts the clock, matters."""
        if self._mark is None:
            self._mark, self._paused = self._clock(), 0.0

    def end_step(self, *, tokens: int, flops_per_token: float) -> None:
        """The step is over; it took `tokens` tokens of all ranks, with `flops_per_token` FLOPs each, forward and backward."""
        now = self._clock()
        seconds = now - self._mark - self._paused
        self._mark, self._paused = now, 0.0
        self._window.append((seconds, tokens, tokens * flops_per_token))
        self.total_seconds += seconds
        self.total_tokens += tokens

    def exclude(self, seconds: float) -> None:
        """`seconds` of the step under way were spent on something that happens once."""
        self._paused += seconds

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Time inside belongs to no step."""
        start = self._clock()
        try:
            yield
        finally:
            self._paused += self._clock() - start
            self.paused_seconds += self._clock() - start

    @property
    def step_seconds(self) -> float:
        """Seconds of the last step."""
        return self._window[-1][0]

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second of all ranks together, over the window."""
        return self._rate(1)

    @property
    def mfu(self) -> float | None:
        """Share of the peak FLOP/s used, over the window; None if the peak is not known."""
        return self._rate(2) / self._peak if self._peak else None

    @property
    def average_tokens_per_second(self) -> float:
        """Tokens per second since the start."""
        return self.total_tokens / max(self.total_seconds, 1e-9)

    def eta(self, tokens: int) -> float:
        """Seconds that `tokens` more will take at the window's speed, with pauses in the proportion seen so far."""
        pauses = self.paused_seconds / max(self.total_seconds, 1e-9)
        return tokens / max(self.tokens_per_second, 1e-9) * (1 + pauses)

    def _rate(self, column: int) -> float:
        return sum(entry[column] for entry in self._window) / max(sum(entry[0] for entry in self._window), 1e-9)
