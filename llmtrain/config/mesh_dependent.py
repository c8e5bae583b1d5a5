"""Options whose numbers depend on the mesh. Everything else gives the same loss on every mesh."""

from collections.abc import Callable
from dataclasses import dataclass

from llmtrain.config.run import RunConfig


@dataclass(frozen=True)
class MeshDependent:
    """The option at `path` makes results depend on the mesh when `applies` says so."""

    path: str
    applies: Callable[[RunConfig], bool]
    reason: str


def _short(dtype: str) -> bool:
    return dtype in ("bf16", "fp16")


MESH_DEPENDENT: list[MeshDependent] = [
    MeshDependent(
        "precision.reduce", lambda run: _short(run.precision.reduce), "sums over ranks are rounded to 16 bits, as often as there are ranks"
    ),
    MeshDependent(
        "precision.accumulate",
        lambda run: _short(run.precision.accumulate),
        "sums over micro-batches are rounded to 16 bits, as often as a rank has micro-batches",
    ),
]


def mesh_dependent(run: RunConfig) -> dict[str, str]:
    """Reason by dotted path, of the options of `run` that make its numbers depend on the mesh."""
    return {entry.path: entry.reason for entry in MESH_DEPENDENT if entry.applies(run)}
