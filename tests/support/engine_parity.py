"""A run under another engine beside one native process: what differs, how far it may, and the lines that a page of parity is made of."""

import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from sameness import loss_difference

LINE = re.compile(r"^(?P<row>.+): (?P<measure>loss|gradient|norm)_difference (?P<found>\S+), (?P<against>control|allowed) (?P<number>\S+)$")
"""What tests of engines print of a row; `control` is how far a run may differ, but for a factor of 5."""


class Difference(NamedTuple):
    """One quantity of a row."""

    measure: str
    found: float
    allowed: float
    of: str = ""
    """The parameter whose gradient it is."""

    @property
    def within(self) -> bool:
        """Whether it is as small as it may be."""
        return self.found <= self.allowed


def differences(run: dict, one: dict, *, loss: float, norm: float, gradient: float) -> Iterator[Difference]:
    """Losses of all steps, the gradients' norm and each parameter's gradient of step 1, in float32: relative differences, and the bound.

    A gradient is compared with its own norm, or with a thousandth of the largest one's.
    """
    yield Difference("loss", loss_difference(run, one), loss)
    yield Difference("norm", abs(run["norms"][0] / one["norms"][0] - 1.0), norm)
    assert run["gradients"].keys() == one["gradients"].keys()
    sizes = {name: float(np.linalg.norm(whole)) for name, whole in one["gradients"].items()}
    least = 1e-3 * max(sizes.values())
    for name, whole in one["gradients"].items():
        yield Difference("gradient", float(np.linalg.norm(run["gradients"][name] - whole)) / max(sizes[name], least), gradient, name)


def say(row: str, found: Iterable[Difference]) -> None:
    """Print the largest difference of each measure, as LINE has it."""
    largest: dict[str, Difference] = {}
    for one in found:
        if one.measure not in largest or one.found > largest[one.measure].found:
            largest[one.measure] = one
    for one in largest.values():
        print(f"{row}: {one.measure}_difference {one.found:.1e}, allowed {one.allowed:.1e}")


def numbers(metrics: Any, path: str = "") -> dict[str, float]:
    """Nested metrics as one level, by path."""
    if isinstance(metrics, int | float):
        return {path: metrics}
    inner = metrics.items() if isinstance(metrics, dict) else enumerate(metrics)
    return {name: value for key, part in inner for name, value in numbers(part, f"{path}.{key}").items()}
