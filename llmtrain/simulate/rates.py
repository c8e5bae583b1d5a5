"""How fast a machine does what `work` lists: a few numbers, the same for every run, and the time of an operator with them."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from llmtrain.errors import UserError
from llmtrain.hardware import Hardware
from llmtrain.simulate.case import FP8
from llmtrain.simulate.work import ATTENTION, GROUPED, PASS, Item

FITTED = Path(__file__).parent / "data" / "fitted.yaml"


@dataclass(frozen=True)
class Rates:
    """Numbers of all machines and frameworks; `docs/plan.md` lists them with where they come from. Shares are between 0 and 1."""

    matrix_nvidia: float = 0.90
    """Share of the best product's rate (`Hardware.rates.matrix`) that a model's products reach."""
    matrix_ascend: float = 0.75
    """The same for Ascend, of the peak."""
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
    network_byte: float
    contention: float
    exchange: float
    latency: float

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

    def total(self, items: Iterable[Item]) -> float:
        """Seconds of the device for all of them, or of the host where that is longer."""
        launches, seconds = 0, 0.0
        for item in items:
            launches += item.launches
            seconds += self.time(item)
        return max(seconds, launches * self.launch)


def machine(hardware: Hardware, rates: Rates, *, dtype: str, fused: bool, older: bool = False) -> Machine:
    """The machine as `rates` have it. Raises UserError where no source gives its peak in `dtype`."""
    kind, own = family(hardware), hardware.rates
    wide = "bfloat16" if dtype == FP8 else dtype
    peak = hardware.peak_flops(wide)
    if peak is None or hardware.memory_bandwidth is None or "node" not in hardware.links:
        raise UserError(f"hardware {hardware.key}: no figure of {wide} products, memory bandwidth or links, so nothing can be predicted")
    best = own.matrix[wide].value if wide in own.matrix else 1.0
    peak *= own.clock.value if own.clock else 1.0
    share = getattr(rates, f"matrix_{kind}")
    if (wide in own.matrix and kind == "ascend") or own.launch is not None:
        share = 1.0  # measured on this machine
    elif wide not in own.matrix and kind == "nvidia":
        best = 0.85
    low_peak = (hardware.peak_flops(FP8) or peak) * (own.clock.value if own.clock else 1.0)
    low_best = own.matrix[FP8].value if FP8 in own.matrix else best
    memory = own.memory.value if own.memory else rates.memory
    bandwidth, node = hardware.memory_bandwidth.value, hardware.links["node"].value
    network = hardware.links.get("network", hardware.links["node"]).value
    attention = 1 / (peak * getattr(rates, f"attention_{kind}") * (best if own.launch is not None else 1.0))
    if older and kind == "nvidia" and FP8 in hardware.peak:
        attention /= rates.attention_older
    byte = 1 / (bandwidth * memory)
    return Machine(
        product=1 / (peak * best * share),
        low=1 / (low_peak * low_best * share * rates.matrix_low),
        grouped=1 / getattr(rates, f"grouped_{kind}"),
        attention=attention,
        attention_back=attention / getattr(rates, f"backward_{kind}"),
        byte=byte,
        product_byte=byte * rates.product_bytes,
        tail=rates.tail,
        launch=own.launch.value if own.launch else getattr(rates, f"launch_{kind}"),
        eager=1.0 if fused else rates.eager,
        node_byte=1 / (node * getattr(rates, f"node_{kind}")),
        network_byte=1 / (network * rates.network),
        contention=getattr(rates, f"contention_{kind}"),
        exchange=1 / rates.exchange,
        latency=own.latency.value if own.latency else rates.latency,
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
