"""Which implementation carries out the products of tp and their collectives."""

from typing import NamedTuple

from llmtrain.errors import UserError
from llmtrain.parallel.ops.implementations import Chunked, Demand, SymmetricMemory
from llmtrain.parallel.ops.npu import MC2

IMPLEMENTATIONS: dict[str, type[Chunked]] = {"chunked": Chunked, "symm_mem": SymmetricMemory, "mc2": MC2}
"""By the name that `implementation=` of the ops takes."""

AUTOMATIC = {"npu": "mc2"}
"""What `auto` tries first on devices of a kind; symm_mem is not tried on cuda, where nobody has run it yet."""


class Chosen(NamedTuple):
    """An implementation by name, and why `auto` did not take the one that it tries first."""

    name: str
    reason: str | None = None

    def __str__(self) -> str:
        return self.name if self.reason is None else f"{self.name} ({self.reason})"


def choose_implementation(kind: str, demand: Demand) -> Chosen:
    """The implementation that `parallel.tp_kind` means. Raises UserError for a named one that is not there or cannot serve this."""
    if kind != "auto":
        check_implementation(kind, demand)
        return Chosen(kind)
    first = AUTOMATIC.get(demand.device)
    if first is None:
        return Chosen("chunked")
    reason = IMPLEMENTATIONS[first].unavailable(demand)
    return Chosen(first) if reason is None else Chosen("chunked", f"{first}: {reason}")


def check_implementation(name: str, demand: Demand) -> None:
    """Raise UserError unless there is an implementation of this name that can serve this."""
    if name not in IMPLEMENTATIONS:
        raise UserError(f"parallel.tp_kind {name}: allowed are auto, {', '.join(IMPLEMENTATIONS)}")
    if reason := IMPLEMENTATIONS[name].unavailable(demand):
        raise UserError(f"parallel.tp_kind {name}: {reason}; use chunked")
