"""What judges a step before the optimizer sees it. Plain arithmetic on values that are equal on every rank, so all ranks decide alike."""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from llmtrain.config.train import SpikeConfig


class GuardStop(Exception):
    """A guard ends the run (exit code 3). `samples` are the global sample indices it blames, if it knows them."""

    def __init__(self, message: str, *, samples: Sequence[int] = ()):
        super().__init__(message)
        self.samples = tuple(samples)


@dataclass(frozen=True)
class Verdict:
    """Whether a step is a spike, and why."""

    spike: bool
    reason: str = ""


def check_finite(loss: float, grad_norm: float) -> str | None:
    """What is wrong with a step whose loss (nats/token) or gradient norm is NaN or infinite; None if both are finite."""
    bad = [f"{name} is {value}" for name, value in (("loss", loss), ("gradient norm", grad_norm)) if not math.isfinite(value)]
    return " and ".join(bad) or None


class SpikeDetector:
    """Counts loss and gradient-norm spikes by the rule of `SpikeConfig`: above mean + sigmas * std of the last `window` steps without one.

    std is the population's. A spike never enters the window, or a run of them would hide the next. A level that lasts is no spike: after
    half a window of spikes in a row the window starts anew. `judge` must be called with the same numbers on every rank.
    """

    def __init__(self, cfg: SpikeConfig):
        self.cfg = cfg
        self.count = 0
        """Spikes seen over the whole run, resumed parts included."""
        self._in_a_row = 0
        self._losses: deque[float] = deque(maxlen=cfg.window)
        self._norms: deque[float] = deque(maxlen=cfg.window)

    def judge(self, loss: float, grad_norm: float) -> Verdict:
        """The verdict on one step's loss (nats/token) and gradient norm (before clipping); takes them into the window if it is none."""
        if self.cfg.action == "off":
            return Verdict(False)
        reasons = [self._excess("loss", loss, self._losses), self._excess("gradient norm", grad_norm, self._norms)]
        reason = " and ".join(r for r in reasons if r)
        if not reason:
            self._in_a_row = 0
            self._losses.append(loss)
            self._norms.append(grad_norm)
            return Verdict(False)
        self.count += 1
        self._in_a_row += 1
        if self._in_a_row >= self._needed:
            reason += f"; {self._in_a_row} in a row, so this is the new level and the window starts anew"
            self._start_anew()
        return Verdict(True, reason)

    def state(self) -> dict:
        """JSON-able and exact: a resumed detector judges as one that never stopped."""
        return {"losses": list(self._losses), "grad_norms": list(self._norms), "count": self.count, "in_a_row": self._in_a_row}

    def load_state(self, state: dict) -> None:
        """Take over state(). A window made smaller since keeps its newest steps."""
        self._losses = deque(state["losses"], maxlen=self.cfg.window)
        self._norms = deque(state["grad_norms"], maxlen=self.cfg.window)
        self.count, self._in_a_row = state["count"], state["in_a_row"]

    @property
    def _needed(self) -> int:
        return self.cfg.window // 2

    def _start_anew(self) -> None:
        self._losses.clear()
        self._norms.clear()
        self._in_a_row = 0

    def _excess(self, name: str, value: float, seen: deque[float]) -> str | None:
        if not math.isfinite(value):
            return f"{name} is {value}"
        if len(seen) < self._needed:
            return None
        mean = math.fsum(seen) / len(seen)
        std = math.sqrt(math.fsum((x - mean) ** 2 for x in seen) / len(seen))
        limit = mean + self.cfg.sigmas * std
        if value <= limit:
            return None
        return f"{name} {value:.4g} > {limit:.4g} (mean {mean:.4g} + {self.cfg.sigmas:g} x std {std:.2g} of {len(seen)} steps)"
