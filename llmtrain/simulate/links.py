"""How long collectives take: which ranks of a group share a node, and what that leaves of the links."""

import math
from dataclasses import dataclass

from llmtrain.layout.traffic import sent
from llmtrain.simulate.case import Case
from llmtrain.simulate.rates import Machine


@dataclass(frozen=True)
class Group:
    """The ranks of one axis."""

    ranks: int
    inside: int
    """Of them in one node."""


def group(case: Case, axis: str) -> Group:
    """The group of an axis; ranks are numbered with tp innermost, then cp (and ep over it), then dp, and pp outermost."""
    node = case.hardware.devices_per_node
    if axis == "ep_inner":
        return Group(case.hierarchical, min(case.hierarchical, node))
    if axis == "ep_outer":
        return Group(case.ep // case.hierarchical, 1)
    size, stride = {
        "tp": (case.tp, 1),
        "cp": (case.cp, case.tp),
        "ep": (case.ep, case.etp),
        "efsdp": (case.sharing // case.ep, case.ep * case.etp),
        "fsdp": (case.dp * case.cp // case.replicas, case.tp),
        "dp_replicate": (case.replicas, case.tp * case.cp * case.dp // case.replicas),
        "pp": (case.pp, case.tp * case.cp * case.dp),
    }[axis]
    return Group(size, min(size, max(1, node // stride)))


def seconds(machine: Machine, where: Group, kind: str, size: float, *, copies: int = 1) -> float:
    """Time of one collective of `size` bytes (see `layout.traffic.sent`) that nothing else disturbs."""
    if where.ranks == 1 or size <= 0:
        return 0.0
    if kind == "once_per_node":
        return _once_per_node(machine, where, size, copies)
    wire, steps = sent(kind, size, where.ranks), where.ranks - 1
    if where.inside == where.ranks:
        byte = machine.node_byte * (machine.exchange if kind == "all_to_all" else 1)
        return wire * byte + _start(machine, where)
    if kind == "all_to_all":
        out = (where.ranks - where.inside) / steps
        return wire * max(out * machine.network_byte, (1 - out) * machine.node_byte) * machine.exchange + _start(machine, where)
    if kind == "send":
        return wire * machine.network_byte + machine.latency
    network = machine.network_byte * (1 + machine.contention * math.log2(where.ranks / where.inside))
    # A ring enters and leaves each node once, and the node's ports carry the rings of all its ranks of the group.
    byte = max(network / where.inside, machine.node_byte)
    return wire * byte + _start(machine, where)


def _once_per_node(machine: Machine, where: Group, size: float, copies: int) -> float:
    """An all-to-all of `size` bytes, `copies` of each token, of which a node gets one; within it they travel on."""
    nodes = where.ranks / where.inside
    reached = (nodes - 1) * (1 - (1 - 1 / nodes) ** copies) / copies
    return max(size * reached * machine.network_byte, size * machine.node_byte) * machine.exchange + _start(machine, where)


def _start(machine: Machine, where: Group) -> float:
    return machine.latency * (1 + (where.ranks - 1) / 8)
