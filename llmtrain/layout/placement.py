"""Which device holds which experts, as arithmetic: a plan by how many tokens each expert gets, and the way of experts that move.

The devices are the ranks of ep. All E experts of a layer stand in slots: slot s is row s % n of the stack of device s // n, n = E /
devices, and `slots[e]` is the slot of expert e. At home, expert e stands in slot e. Plans are made as in MindSpeed's dynamic expert
placement, in the manner of Pangu Ultra MoE (arXiv 2505.04519): heaviest experts first, each to the device with the fewest tokens so far.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from llmtrain.config.train import ExpertPlacementConfig


def home(experts: int) -> list[int]:
    """The slots of experts of which nobody has moved."""
    return list(range(experts))


def device_loads(loads: Sequence[float], slots: Sequence[int], devices: int) -> list[float]:
    """Tokens of each device, from those of each expert."""
    held, found = len(loads) // devices, [0.0] * devices
    for load, slot in zip(loads, slots):
        found[slot // held] += load
    return found


def variation(values: Sequence[float]) -> float:
    """Coefficient of variation: standard deviation (of the population) over the mean; 0 if all are 0."""
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / len(values)) / mean if mean else 0.0


def balanced(loads: Sequence[float], slots: Sequence[int], devices: int) -> list[int]:
    """New slots: the heaviest expert not yet placed goes to the device that has the fewest tokens and a free slot, again and again.

    Of equally heavy experts the first comes first; of devices with equally few tokens the one that holds the expert now, then the first. An
    expert that stays on its device stays in its slot.
    """
    held = len(loads) // devices
    tokens, members = [0.0] * devices, [[] for _ in range(devices)]
    for expert in sorted(range(len(loads)), key=lambda expert: (-loads[expert], expert)):
        now = slots[expert] // held
        free = (device for device in range(devices) if len(members[device]) < held)
        device = min(free, key=lambda device: (tokens[device], device != now, device))
        tokens[device] += loads[expert]
        members[device].append(expert)
    return _settled(members, slots, held)


def _settled(members: Sequence[Sequence[int]], slots: Sequence[int], held: int) -> list[int]:
    """Slots of the members of each device: their own where they stay, else the free ones in order."""
    found = list(slots)
    for device, experts in enumerate(members):
        staying = {slots[expert] for expert in experts if slots[expert] // held == device}
        free = iter(slot for slot in range(device * held, (device + 1) * held) if slot not in staying)
        for expert in sorted(expert for expert in experts if slots[expert] // held != device):
            found[expert] = next(free)
    return found


class Plan(NamedTuple):
    """Where a layer's experts are to go, and the coefficients of variation of the devices' tokens with the old slots and the new ones."""

    slots: list[int]
    before: float
    after: float


def plan(loads: Sequence[float], slots: Sequence[int], devices: int, *, gain: float) -> Plan | None:
    """The move that `loads`, tokens of each expert, ask for; None where the variation would not fall by at least `gain`."""
    wanted = balanced(loads, slots, devices)
    before, after = (variation(device_loads(loads, where, devices)) for where in (slots, wanted))
    return Plan(wanted, before, after) if after < before and before - after >= gain else None


class Planner:
    """Where the experts of all L layers are to be, from step to step. Of the same counts every rank, and a resumed run, makes the same."""

    def __init__(self, cfg: ExpertPlacementConfig, *, layers: int, experts: int, devices: int):
        self.cfg, self.devices = cfg, devices
        self.slots = [home(experts) for _ in range(layers)]
        """Where experts are to be, by layer."""
        self._averages = [[0.0] * experts for _ in range(layers)]
        self._seen = 0

    def add(self, counts: Sequence[Sequence[float]]) -> None:
        """Take a step's tokens of each expert of each layer into the averages."""
        keep, self._seen = self.cfg.ema, self._seen + 1
        self._averages = [
            [keep * average + (1 - keep) * count for average, count in zip(averages, layer)]
            for averages, layer in zip(self._averages, counts)
        ]

    def check(self) -> dict[int, Plan]:
        """Before a step: plans, now taken over into `slots`, of layers that are to change, where a check is due; {} where none is."""
        if not self._seen or self._seen % self.cfg.every:
            return {}
        found = {}
        for layer, (averages, slots) in enumerate(zip(self._averages, self.slots)):
            planned = plan(averages, slots, self.devices, gain=self.cfg.gain)
            if planned is not None:
                self.slots[layer], found[layer] = planned.slots, planned
        return found

    def state(self) -> dict:
        """JSON-able and exact."""
        return {"devices": self.devices, "seen": self._seen, "slots": self.slots, "averages": self._averages}

    def load_state(self, state: dict) -> None:
        """Take over state(); for another number of devices the averages alone, and experts are at home."""
        self._seen, self._averages = state["seen"], state["averages"]
        same = state["devices"] == self.devices
        self.slots = state["slots"] if same else [home(len(averages)) for averages in self._averages]


class Place(NamedTuple):
    """A slot, where the rows of each device are shared out over shards (the ranks of efsdp) in equal runs, the last of them shorter."""

    device: int
    shard: int
    row: int
    """In the shard."""


def place(slot: int, *, held: int, shards: int) -> Place:
    """Where `slot` is, `held` rows a device."""
    device, row = divmod(slot, held)
    return Place(device, *divmod(row, -(-held // shards)))


class Hop(NamedTuple):
    """One exchange along an axis, as a rank sees it."""

    order: list[int]
    """Which of the rows that it has it sends, in order of receivers."""
    sent: list[int]
    """Rows to each rank of the axis."""
    arriving: list[int]
    """Rows from each."""


@dataclass(frozen=True)
class Route:
    """How the rows of one rank travel when experts move: along the devices first, then along the shards. Every row is a whole expert.

    The first hop takes rows of the rank's stack, the second those that the first one brought; what the last one brings goes to the rows
    `into` of the stack. All rows not in the first hop stay.
    """

    hops: list[Hop]
    into: list[int]


def route(before: Sequence[int], after: Sequence[int], *, devices: int, shards: int, device: int, shard: int) -> Route:
    """The way of the experts that change their slots from `before` to `after`, for the rank that is `shard` of `device`."""
    held = len(before) // devices
    source, target = ([place(slot, held=held, shards=shards) for slot in slots] for slots in (before, after))
    moving = [expert for expert in range(len(before)) if before[expert] != after[expert]]

    def halfway(device: int, shard: int) -> list[int]:
        """The experts that rank has between the hops: those for its device that came from its own shard, in order of where from."""
        found = [expert for expert in moving if target[expert].device == device and source[expert].shard == shard]
        return sorted(found, key=lambda expert: (source[expert].device, expert))

    mine = sorted((expert for expert in moving if source[expert][:2] == (device, shard)), key=lambda expert: target[expert].device)
    first = _hop(mine, lambda e: target[e].device, halfway(device, shard), lambda e: source[e].device, ranks=devices)
    first = first._replace(order=[source[expert].row for expert in mine])
    if shards == 1:
        return Route([first], [target[expert].row for expert in halfway(device, shard)])
    arrived = [expert for other in range(shards) for expert in halfway(device, other) if target[expert].shard == shard]
    second = _hop(halfway(device, shard), lambda e: target[e].shard, arrived, lambda e: source[e].shard, ranks=shards)
    return Route([first, second], [target[expert].row for expert in arrived])


def _hop(sent: list[int], to: Callable, arriving: list[int], source: Callable, *, ranks: int) -> Hop:
    order = sorted(range(len(sent)), key=lambda at: to(sent[at]))
    counts = [[sum(of(expert) == rank for expert in experts) for rank in range(ranks)] for of, experts in ((to, sent), (source, arriving))]
    return Hop(order, *counts)
