"""The bytes of one rank's record: whole numbers, and the names that some of them stand for. Read by other processes; imports no torch."""

from enum import IntEnum

FORWARD, BACKWARD = 1, 2
SIZE = 4096
"""Bytes of a record."""


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


_NAMES = 8 * len(Field)  # where the names begin: UTF-8, a line each, the first one being number 1


class Record:
    """A record in memory of this process, until `attach` moves it into shared memory."""

    def __init__(self):
        self._bytes = memoryview(bytearray(SIZE))
        self.slots = self._bytes[:_NAMES].cast("q")
        """The numbers, by Field."""
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
    """A record in words, by the fields' names in small letters; `op` is None outside of collectives."""
    numbers = memoryview(data[:_NAMES]).cast("q")
    names = ["", *data[_NAMES:].rstrip(b"\0").decode(errors="replace").splitlines()]

    def name(field: Field) -> str | None:
        number = numbers[field]
        return names[number] if 0 < number < len(names) else None

    return {
        "pid": numbers[Field.PID],
        "marks": numbers[Field.MARKS],
        "calls": numbers[Field.CALLS],
        "step": numbers[Field.STEP],
        "phase": name(Field.PHASE),
        "micro_batch": numbers[Field.MICRO_BATCH],
        "layer": name(Field.LAYER),
        "direction": {FORWARD: "forward", BACKWARD: "backward"}.get(numbers[Field.DIRECTION]),
        "op": name(Field.OP),
        "group": name(Field.GROUP),
        "peer": numbers[Field.PEER],
        "since": numbers[Field.SINCE],
    }
