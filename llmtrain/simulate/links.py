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


def seconds(machine: Machine, where: Group, kind: str, size: float, *, copies: int = 1, around: bool = False) -> float:
    """Time of one collective of `size` bytes (see `layout.traffic.sent`) that nothing else disturbs.

    around: each rank sends to its neighbour alone (attention's ring), so that of a mesh's lanes it uses those to one device.
    """
    if where.ranks == 1 or size <= 0:
        return 0.0
    if machine.collectives:
        byte, latency = _measured(machine, kind, where.ranks)
        return sent(kind, size, where.ranks) * byte + latency
    node_byte = machine.node_byte * _lanes(machine, where, one=around or kind == "send")
    if kind == "once_per_node":
        return _once_per_node(machine, where, size, copies)
    wire, steps = sent(kind, size, where.ranks), where.ranks - 1
    if where.inside == where.ranks:
        byte = node_byte * (machine.exchange if kind == "all_to_all" else 1)
        return wire * byte + _start(machine, where)
    if kind == "all_to_all":
        out = (where.ranks - where.inside) / steps
        return wire * max(out * machine.network_byte, (1 - out) * node_byte) * machine.exchange + _start(machine, where)
    if kind == "send":
        return wire * machine.network_byte + machine.latency
    network = machine.network_byte * (1 + machine.contention * math.log2(where.ranks / where.inside))
    # A ring enters and leaves each node once, and the node's ports carry the rings of all its ranks of the group.
    byte = max(network / where.inside, node_byte)
    return wire * byte + _start(machine, where)


def _measured(machine: Machine, kind: str, ranks: int) -> tuple[float, float]:
    """Seconds per byte and call, of the measured group that is most like one of `ranks`."""
    sizes = [size for known, size in machine.collectives if known == kind]
    return machine.collectives[kind, min(sizes, key=lambda size: abs(size - ranks))]


def _lanes(machine: Machine, where: Group, *, one: bool) -> float:
    """How many times slower than all lanes of a device those are that a group uses."""
    others = min(where.inside, machine.lanes + 1) - 1
    return machine.lanes / (1 if one else others) if machine.lanes and others > 0 else 1.0


def _once_per_node(machine: Machine, where: Group, size: float, copies: int) -> float:
    """An all-to-all of `size` bytes, `copies` of each token, of which a node gets one; within it they travel on."""
    nodes = where.ranks / where.inside
    reached = (nodes - 1) * (1 - (1 - 1 / nodes) ** copies) / copies
    return max(size * reached * machine.network_byte, size * machine.node_byte) * machine.exchange + _start(machine, where)


def _start(machine: Machine, where: Group) -> float:
    return machine.latency * (1 + (where.ranks - 1) / 8)
