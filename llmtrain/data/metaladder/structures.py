"""What templated word problems are made of: the structure of the arithmetic, and how numbers for it are drawn."""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from llmtrain.data.errors import DataError

Step = tuple[str, str, str, str]
"""(result, left, operation, right), the names of numbers."""
TRIES = 20_000
OPERATIONS: dict[str, Callable[[int, int], int | None]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: None if a % b else a // b,
}


@dataclass(frozen=True)
class Structure:
    """The arithmetic that all stories of one kind share. The last step gives the answer."""

    strategy: str
    """Problem type and solution method."""
    given: str
    """Names of the given numbers, a letter each."""
    steps: tuple[Step, ...]


STRUCTURES = {
    "gain_loss": Structure(
        "This is a problem of gaining and losing. First add what comes to what is there, then subtract what goes.",
        "abc",
        (("x", "a", "+", "b"), ("y", "x", "-", "c")),
    ),
    "two_losses": Structure(
        "This is a problem of losing twice. Subtract the first loss from the beginning, then the second loss from what is left.",
        "abc",
        (("x", "a", "-", "b"), ("y", "x", "-", "c")),
    ),
    "groups_extra": Structure(
        "This is a problem of equal groups with extra ones. First multiply the groups by their size, then add the extra ones.",
        "abc",
        (("x", "a", "*", "b"), ("y", "x", "+", "c")),
    ),
    "groups_used": Structure(
        "This is a problem of equal groups of which some are used. First multiply the groups by their size, then subtract what is used.",
        "abc",
        (("x", "a", "*", "b"), ("y", "x", "-", "c")),
    ),
    "joined_shared": Structure(
        "This is a problem of joining and sharing. First add the two amounts, then divide the sum by the number of shares.",
        "abc",
        (("x", "a", "+", "b"), ("y", "x", "/", "c")),
    ),
    "left_shared": Structure(
        "This is a problem of sharing what is left. First subtract what is taken away, then divide the rest by the number of shares.",
        "abc",
        (("x", "a", "-", "b"), ("y", "x", "/", "c")),
    ),
    "more_total": Structure(
        "This is a problem of comparing with more. First add the difference to find the larger amount, then add both amounts.",
        "ab",
        (("x", "a", "+", "b"), ("y", "x", "+", "a")),
    ),
    "fewer_total": Structure(
        "This is a problem of comparing with fewer. First subtract the difference to find the smaller amount, then add both amounts.",
        "ab",
        (("x", "a", "-", "b"), ("y", "x", "+", "a")),
    ),
    "times_total": Structure(
        "This is a problem of comparing by a multiple. First multiply to find the larger amount, then add both amounts.",
        "ab",
        (("x", "a", "*", "b"), ("y", "x", "+", "a")),
    ),
    "two_kinds": Structure(
        "This is a problem of two kinds of groups. Multiply each kind by its size, then add the two products.",
        "abcd",
        (("x", "a", "*", "b"), ("y", "c", "*", "d"), ("z", "x", "+", "y")),
    ),
}


def numbers(structure: Structure, draw: Random, *, largest: int) -> dict[str, int]:
    """Given and computed numbers by name, all of 2..largest. Raises DataError if `largest` allows none."""
    for _ in range(TRIES):
        values = {name: draw.randint(2, largest) for name in structure.given}
        if _compute(structure, values, largest):
            return values
    raise DataError(f"--largest {largest}: no numbers for '{structure.strategy}' were found; give at least 12")


def _compute(structure: Structure, values: dict[str, int], largest: int) -> bool:
    for result, left, operation, right in structure.steps:
        value = OPERATIONS[operation](values[left], values[right])
        if value is None or not 2 <= value <= largest:
            return False
        values[result] = value
    return True
