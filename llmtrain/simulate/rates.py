"""How fast a machine does what `work` lists: a few numbers, the same for every run, and the time of an operator with them."""

import math
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from llmtrain.errors import UserError
from llmtrain.hardware import Hardware
from llmtrain.simulate.case import FP8, LOW
from llmtrain.simulate.work import ATTENTION, GROUPED, PASS, Item

FITTED = Path(__file__).parent / "data" / "fitted.yaml"


@dataclass(frozen=True)
class Rates:
    """Numbers of all machines and frameworks; `docs/plan.md` lists them with where they come from. Shares are between 0 and 1."""

    matrix_nvidia: float = 0.90
    """Share of the best product's rate (`Hardware.rates.matrix`) that a model's products reach."""
    matrix_ascend: float = 0.69
    """The same for Ascend, of the 354 TFLOP/s that MindSpeed divides by: 0.78 of the 313 that circulate for the 910B3 of most machines."""
    matrix_low: float = 0.80
    """Further share in fp8."""
    grouped_nvidia: float = 0.75
    """Further share for products of experts."""
    grouped_ascend: float = 0.55
    product_bytes: float = 0.35
    """Part of the time for a product's bytes that is not beside its computation."""
    tail: float = 8e-6
    """Seconds that a product takes beside its work: start and last, unfilled wave."""
    attention_nvidia: float = 0.68
    """Share of the peak in the forward pass of attention, heads of 128 over long sequences, by kernels of the GPU's own generation."""
    attention_older: float = 0.58
    """Further share of FlashAttention 2, written for A100, on later GPUs."""
    attention_ascend: float = 0.50
    backward_nvidia: float = 0.80
    """Rate of attention's backward pass over that of its forward pass."""
    backward_ascend: float = 0.75
    memory: float = 0.80
    """Share of the memory bandwidth in element-wise work."""
    eager: float = 2.2
    """Bytes that eager frameworks move over those of fused ones."""
    launch_nvidia: float = 12e-6
    """Seconds of the host per operator of `work`, with the views and bookkeeping around it."""
    launch_ascend: float = 50e-6
    node_nvidia: float = 0.80
    """Share of the links' bandwidth within a node."""
    node_ascend: float = 0.80
    network: float = 0.80
    contention_nvidia: float = 0.08
    """Further time across nodes (InfiniBand) per doubling of the nodes of a group."""
    contention_ascend: float = 0.08
    """The same for RoCE."""
    exchange: float = 0.60
    """Further share for all-to-alls."""
    latency: float = 20e-6
    """Seconds of a collective of two ranks; eight steps more of its ring take as long again."""
    tp_hidden: float = 0.65
    """Share of tensor parallelism's sends that hides beside products where the framework does that."""
    behind: float = 0.80
    """Share of the gathering for weights' gradients that hides."""
    cp_hidden: float = 0.70
    dp_hidden: float = 0.80
    """Share of the reduction of gradients (and gathering of parameters) that hides, as far as there is time beside which."""
    ep_hidden: float = 0.70
    straggle: float = 0.010
    """Part of a step over several nodes that is lost per doubling of the data-parallel ranks, which wait for the slowest at its end."""
    imbalance: float = 1.20
    """Tokens of the busiest rank of experts over the mean, where routing is not forced to be even."""
    host_link: float = 20e9
    """Bytes per second between a device and its host's memory."""
    step: float = 0.010
    """Seconds per step outside the model: data, scalars, clipping, logging."""

    def with_(self, **changes: float) -> "Rates":
        """The same with some values changed."""
        return replace(self, **changes)


NAMES = tuple(one.name for one in fields(Rates))


def family(hardware: Hardware) -> str:
    """Whose launch costs and kernels count: nvidia or ascend; a machine with `rates` of its own needs neither."""
    return "ascend" if hardware.vendor == "Huawei" else "nvidia"


@dataclass(frozen=True)
class Machine:
    """Seconds for flops and bytes on one device."""

    product: float
    """Seconds per FLOP of products in 16 bits (or what the case computes in)."""
    low: float
    grouped: float
    attention: float
    attention_back: float
    byte: float
    product_byte: float
    tail: float
    launch: float
    eager: float
    node_byte: float
    lanes: int
    """Devices of the node to which a device has lanes of its own; 0 where a switch joins them."""
    network_byte: float
    contention: float
    exchange: float
    latency: float
    collectives: dict[tuple[str, int], tuple[float, float]]
    """Seconds per byte and per call of a kind of collective over so many ranks, where they were measured."""
    shared: float
    """Ranks to each processor core that computes for them; 0 for devices of their own."""

    def time(self, item: Item) -> float:
        """Seconds of the device for `item`."""
        if item.kind == PASS:
            return item.bytes * self.byte * (1.0 if item.name == "loss" else self.eager)
        if item.kind == ATTENTION:
            return item.flops * (self.attention_back if item.backward else self.attention)
        rate = self.low if item.low else self.product
        if item.kind == GROUPED:
            rate *= self.grouped
        return item.flops * rate + item.bytes * self.product_byte + self.tail


def machine(hardware: Hardware, rates: Rates, *, dtype: str, fused: bool, older: bool = False, parted: bool = False) -> Machine:
    """The machine as `rates` have it; what its own description measures goes first. parted: attention under context parallelism.

    Raises UserError where no source gives its peak in `dtype`, its memory bandwidth or its links.
    """
    own, wide = hardware.rates, "bfloat16" if dtype in LOW else dtype
    peak = hardware.peak_flops(wide)
    if peak is None or hardware.memory_bandwidth is None or "node" not in hardware.links:
        raise UserError(f"hardware {hardware.key}: no figure of {wide} products, memory bandwidth or links, so nothing can be predicted")
    kind, measured = family(hardware), own.launch is not None
    clock = own.clock.value if own.clock else 1.0
    product = peak * clock * _best(hardware, wide) * (1.0 if measured else _of(rates, "matrix", kind))
    narrow = dtype if dtype in hardware.peak and dtype in LOW else FP8
    low = (hardware.peak_flops(narrow) or peak) * clock * _best(hardware, FP8) * _of(rates, "matrix", kind) * rates.matrix_low
    forward, backward = (own.context, own.context_backward) if parted and own.context else (own.attention, own.attention_backward)
    attention = peak * clock * (forward.value if forward else _of(rates, "attention", kind))
    if older and kind == "nvidia" and FP8 in hardware.peak:
        attention *= rates.attention_older
    back = backward.value if backward else _of(rates, "backward", kind)
    byte = 1 / (hardware.memory_bandwidth.value * (own.memory.value if own.memory else rates.memory))
    node = hardware.links["node"].value
    network = hardware.links.get("network", hardware.links["node"]).value
    return Machine(
        product=1 / product,
        low=1 / low,
        grouped=1 / (own.grouped.value if own.grouped else 1.0 if measured else _of(rates, "grouped", kind)),
        attention=1 / attention,
        attention_back=1 / (attention * back),
        byte=byte,
        product_byte=byte * rates.product_bytes,
        tail=rates.tail,
        launch=own.launch.value if own.launch else _of(rates, "launch", kind),
        eager=1.0 if fused else rates.eager,
        node_byte=1 / (node * (1.0 if measured else _of(rates, "node", kind))),
        lanes=hardware.devices_per_node - 1 if hardware.links["node"].mesh else 0,
        network_byte=1 / (network * (1.0 if measured else rates.network)),
        contention=_of(rates, "contention", kind),
        exchange=1 / rates.exchange,
        latency=own.latency.value if own.latency else rates.latency,
        collectives={(one.kind, one.ranks): (1 / one.value, one.latency) for one in own.collectives},
        shared=hardware.devices_per_node / hardware.cores if hardware.cores else 0.0,
    )


def _of(rates: Rates, name: str, kind: str) -> float:
    return getattr(rates, f"{name}_{kind}")


def _best(hardware: Hardware, dtype: str) -> float:
    """Share of the peak that the best product reaches: as measured, else that of the 16-bit formats, else as most NVIDIA cards do."""
    known = hardware.rates.matrix
    if dtype in known:
        return known[dtype].value
    return (
        known["bfloat16"].value if "bfloat16" in known else 0.85 if family(hardware) == "nvidia" and hardware.rates.launch is None else 1.0
    )


@cache
def stored() -> dict[str, Any]:
    """The fitted numbers: `all` by every source, and by source family those fitted without it."""
    return yaml.safe_load(FITTED.read_text()) if FITTED.exists() else {"all": {}, "without": {}}


def fitted(without: str | None = None) -> Rates:
    """The numbers fitted on all sources, or on all but the family `without`."""
    found = stored()
    values = found["without"].get(without, found["all"]) if without else found["all"]
    return Rates(**{name: float(value) for name, value in values.items()})


def finite(value: float) -> bool:
    """Whether a prediction is a time at all."""
    return math.isfinite(value) and value > 0
