"""What a step waits for: how much of it would go if one thing were twice as fast, or if there were no bubble."""

from typing import NamedTuple

from llmtrain.hardware import Hardware, Quantity
from llmtrain.simulate.case import Case
from llmtrain.simulate.rates import Rates
from llmtrain.simulate.step import Step, price


class Gain(NamedTuple):
    """Share of the step that goes if `what` is twice as fast."""

    what: str
    share: float


def gains(case: Case, rates: Rates, step: Step) -> list[Gain]:
    """All of them, the largest first."""
    half = [(what, _doubled(case.hardware, part)) for what, part in PARTS.items() if _has(case.hardware, part)]
    found = [Gain(what, 1 - price(case.with_(hardware=faster), rates).seconds / step.seconds) for what, faster in half]
    quick = rates.with_(launch_nvidia=rates.launch_nvidia / 2, launch_ascend=rates.launch_ascend / 2)
    found.append(Gain("the host", 1 - price(case, quick).seconds / step.seconds))
    found.append(Gain(BUBBLE, step.parts.get("bubble", 0.0) / 2 / step.seconds))
    return sorted(found, key=lambda gain: -gain.share)


BUBBLE = "twice the micro-batches"
PARTS = {
    "matrix products and attention": "peak",
    "the device's memory": "memory_bandwidth",
    "links within a node": "node",
    "the network between nodes": "network",
}


def _has(hardware: Hardware, part: str) -> bool:
    return part not in ("node", "network") or part in hardware.links


def _doubled(hardware: Hardware, part: str) -> Hardware:
    if part == "peak":
        return hardware.model_copy(update={"peak": {name: _twice(value) for name, value in hardware.peak.items()}})
    if part == "memory_bandwidth":
        return hardware.model_copy(update={part: _twice(hardware.memory_bandwidth)})
    return hardware.model_copy(update={"links": hardware.links | {part: _twice(hardware.links[part])}})


def _twice(quantity: Quantity) -> Quantity:
    return quantity.model_copy(update={"value": 2 * quantity.value})


def sentence(case: Case, step: Step, found: list[Gain], *, memory_share: float) -> str:
    """The binding constraint in words."""
    if memory_share > 1:
        return f"Memory binds: this needs {memory_share:.0%} of what a device has, so it cannot run."
    first, second = found[:2]
    if first.what == BUBBLE:
        words = f"The pipeline's bubble binds: {first.what} would take {first.share:.0%} off the time of a token"
    else:
        many = first.what in ("matrix products and attention", "links within a node")
        does, they = ("bind", "they") if many else ("binds", "it")
        words = f"{first.what[0].upper()}{first.what[1:]} {does}: twice as fast, {they} would take {first.share:.0%} off the step"
    return f"{words}; then {second.what}, {second.share:.0%}. Memory is {memory_share:.0%} full."
