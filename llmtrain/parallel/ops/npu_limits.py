"""What torch_npu's operators that join products and collectives can do: the limits that are documented for them.

Sources: the documentation in the wheel of torch_npu 2.13.0 (`_op_plugin_docs.py`), and for what it leaves out that of the CANN operators
beneath (aclnnAlltoAllvGroupedMatMul, aclnnGroupedMatMulAlltoAllv). Not run on hardware.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from llmtrain.parallel.ops.implementations import Demand

SIXTEEN_BITS = (torch.bfloat16, torch.float16)
GENERATIONS = {"ascend-910b": "Atlas A2", "ascend-910c": "Atlas A3"}
"""By the beginning of a key of llmtrain.hardware."""


@dataclass(frozen=True)
class Limits:
    """Of both kinds of operator."""

    dtypes: tuple[torch.dtype, ...] = SIXTEEN_BITS
    ranks: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Sizes of the group by generation; a generation that is not here has no such operator."""

    def refuse(self, device: str, ranks: int, dtype: torch.dtype | None, hardware: str | None) -> str | None:
        """Why this cannot be served, or None; what is None is not judged."""
        if device != "npu":
            return f"torch_npu's operators are there on npu alone, not on {device}"
        if dtype is not None and dtype not in self.dtypes:
            names = " and ".join(str(allowed).removeprefix("torch.") for allowed in self.dtypes)
            return f"computes in {names}, not in {str(dtype).removeprefix('torch.')} (precision.compute)"
        generation = generation_of(hardware)
        if hardware is not None and generation not in self.ranks:
            return f"documented for {' and '.join(self.ranks)}, not for {generation or hardware}"
        sizes = self.ranks[generation] if generation else max(self.ranks.values(), key=len)
        if ranks not in sizes:
            return f"takes groups of {', '.join(map(str, sizes))} ranks{f' on {generation}' if generation else ''}, not of {ranks}"
        return None


@dataclass(frozen=True)
class PairLimits(Limits):
    """Of npu_all_gather_base_mm and npu_mm_reduce_scatter_base."""

    ranks: Mapping[str, tuple[int, ...]] = field(default_factory=lambda: {"Atlas A2": (2, 4, 8), "Atlas A3": (2, 4, 8, 16)})
    sums: range = range(256, 65535)
    """Lengths that a product may sum over."""


@dataclass(frozen=True)
class ExchangeLimits(Limits):
    """Of npu_alltoallv_gmm and npu_gmm_alltoallv."""

    ranks: Mapping[str, tuple[int, ...]] = field(default_factory=lambda: {"Atlas A3": (8, 16, 32, 64)})
    widths: range = range(1, 65536)
    held: range = range(1, 33)
    """Experts of one rank."""
    experts: int = 256
    """At most so many in all."""
    choices: range = range(2, 9)
    """Experts of one token."""
    sent: range = range(2 << 20, (100 << 20) + 1)
    """Bytes that one rank sends."""


PAIRS = PairLimits()
EXCHANGE = ExchangeLimits()
"""The operators' limits, in one place each. Tests put wider ones here to compute in fp32 and with small models."""


@dataclass(frozen=True)
class ExchangeDemand:
    """What a mixture of experts asks of the exchange."""

    device: str
    ranks: int
    experts: int
    widths: tuple[int, ...]
    choices: int
    sent: tuple[int, ...]
    """Bytes that one rank sends, in each phase."""
    dtype: torch.dtype | None = None
    hardware: str | None = None


def generation_of(hardware: str | None) -> str | None:
    """`Atlas A2` or `Atlas A3` for a key of llmtrain.hardware, or None for others."""
    return next((name for key, name in GENERATIONS.items() if hardware is not None and hardware.startswith(key)), None)


def refuse_pairs(demand: Demand) -> str | None:
    """Why the operators for tp cannot serve this, or None."""
    if reason := PAIRS.refuse(demand.device, demand.ranks, demand.dtype, demand.hardware):
        return reason
    if outside := [length for length in demand.sums if length not in PAIRS.sums]:
        allowed = f"{PAIRS.sums[0]} to {PAIRS.sums[-1]:,} numbers"
        return f"its products sum over {allowed}; with parallel.tp {demand.ranks} one of this model sums over {outside[0]}"
    return None


def refuse_exchange(demand: ExchangeDemand) -> str | None:
    """Why the operators for ep cannot serve this, or None."""
    limits, held = EXCHANGE, demand.experts // demand.ranks
    if reason := limits.refuse(demand.device, demand.ranks, demand.dtype, demand.hardware):
        return reason
    if demand.experts > limits.experts or held not in limits.held:
        return f"takes up to {limits.held[-1]} experts a rank and {limits.experts} in all, not {held} and {demand.experts}"
    if demand.choices not in limits.choices:
        return f"takes {limits.choices[0]} to {limits.choices[-1]} experts a token, not model.ffn.top_k {demand.choices}"
    if wide := [width for width in demand.widths if width not in limits.widths]:
        return f"takes widths up to {limits.widths[-1]:,}, not {wide[0]:,}"
    if amounts := [amount for amount in demand.sent if amount not in limits.sent]:
        least, most = (limit / 2**20 for limit in (limits.sent[0], limits.sent[-1]))
        sent = f"{amounts[0] / 2**20:.4g} MiB (tokens of a micro-batch x top_k x hidden width)"
        return f"a rank may send {least:.4g} to {most:.4g} MiB at a time, not {sent}; change train.micro_batch"
    return None
