"""The bytes of one rank's record: whole numbers, and the names that some of them stand for. Read by other processes; imports no torch."""

from collections import deque
from enum import IntEnum

FORWARD, BACKWARD = 1, 2
DIRECTIONS = {FORWARD: "forward", BACKWARD: "backward"}
DEVICE = "device"
"""The op of a rank that reads from its device, and waits there for whatever was begun."""
SIZE = 8192
"""Bytes of a record."""
COUNTS = 64
"""Groups, and pairs of ranks, whose collectives are counted."""
KEPT = 1024
"""Collectives that a rank remembers having begun, while it does not know them to be finished."""


class Field(IntEnum):
    """Place of each number, 64 bits wide."""

    PID = 0
    MARKS = 1  # grows with every mark: progress
    STEP = 2
    PHASE = 3  # a name
    MICRO_BATCH = 4
    LAYER = 5  # a name
    DIRECTION = 6  # FORWARD, BACKWARD, or 0
    OP = 7  # a name, 0 outside of collectives
    GROUP = 8  # a name
    PEER = 9
    SINCE = 10  # nanoseconds since 1970 at which the collective began
    CALLS = 11  # collectives recorded so far


_NUMBERS = len(Field) + 2 * COUNTS  # the fields, then pairs (a name, how many collectives of it were begun)
_NAMES = 8 * _NUMBERS  # where the names begin: UTF-8, a line each, the first one being number 1


class Record:
    """A record in memory of this process, until `attach` moves it into shared memory."""

    def __init__(self):
        self._bytes = memoryview(bytearray(SIZE))
        self.slots = self._bytes[:_NAMES].cast("q")
        """The numbers, by Field, and behind them the counts."""
        self.begun: deque[tuple[int, ...]] = deque(maxlen=KEPT)
        """Collectives begun and not known to be finished, oldest first: place of the count, op, group, peer, layer, direction, micro-batch.
        Names by their numbers. Known to this process alone."""
        self.slots[Field.MICRO_BATCH] = self.slots[Field.PEER] = -1
        self._numbers: dict[str, int] = {}

    def number(self, name: str) -> int:
        """The number that stands for `name`; names that no longer fit all are the same `...`."""
        return self._numbers.get(name) or self._new(name)

    def _new(self, name: str) -> int:
        taken = "".join(f"{known}\n" for known in self._numbers).encode()
        added = name.encode()[:64].replace(b"\n", b" ") + b"\n"
        if _NAMES + len(taken) + len(added) > SIZE - len(b"...\n"):
            if "..." in self._numbers:
                return self._numbers["..."]
            name, added = "...", b"...\n"
        start = _NAMES + len(taken)
        self._bytes[start : start + len(added)] = added
        self._numbers[name] = len(self._numbers) + 1
        return self._numbers[name]

    def names(self) -> list[str]:
        """All names by number; number 0 is none."""
        return ["", *self._numbers]

    def count_of(self, key: str) -> int:
        """The place among `slots` where collectives of `key` are counted; 0 if there is no place left for it."""
        number = self.number(key)
        for place in range(len(Field), _NUMBERS, 2) if number != self._numbers.get("...") else ():
            if self.slots[place] in (0, number):
                self.slots[place] = number
                return place + 1
        return 0

    def attach(self, memory: memoryview) -> None:
        """Go on in `memory`, SIZE bytes that others can read."""
        memory[:] = self._bytes
        self._bytes, self.slots = memory, memory[:_NAMES].cast("q")

    def detach(self) -> None:
        """Go on in memory of this process's own."""
        shared, slots = self._bytes, self.slots
        self._bytes = memoryview(bytearray(shared))
        self.slots = self._bytes[:_NAMES].cast("q")
        slots.release()
        shared.release()

    def read(self) -> dict:
        """See `decode`."""
        return decode(bytes(self._bytes))


def decode(data: bytes) -> dict:
    """A record in words, by the fields' names in small letters; `op` is None outside of collectives, `counts` are collectives begun."""
    numbers = memoryview(data[:_NAMES]).cast("q")
    names = ["", *data[_NAMES:].rstrip(b"\0").decode(errors="replace").splitlines()]

    def name(place: int) -> str | None:
        number = numbers[place]
        return names[number] if 0 < number < len(names) else None

    return {
        "pid": numbers[Field.PID],
        "marks": numbers[Field.MARKS],
        "calls": numbers[Field.CALLS],
        "step": numbers[Field.STEP],
        "phase": name(Field.PHASE),
        "micro_batch": numbers[Field.MICRO_BATCH],
        "layer": name(Field.LAYER),
        "direction": DIRECTIONS.get(numbers[Field.DIRECTION]),
        "op": name(Field.OP),
        "group": name(Field.GROUP),
        "peer": numbers[Field.PEER],
        "since": numbers[Field.SINCE],
        "counts": {name(place): numbers[place + 1] for place in range(len(Field), _NUMBERS, 2) if numbers[place]},
    }
