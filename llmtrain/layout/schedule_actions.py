"""What a pipeline schedule consists of: actions, and per rank the list of them."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

Placement = Literal["loop", "v"]
OVERLAP = "OVERLAP_F_B"


class Action(NamedTuple):
    """One thing that a rank does for one micro-batch at one stage.

    Kinds: `F` forward; `B` whole backward; `I` backward for the stage's inputs and later `W` for its weights, together a `B`;
    `SEND_F` output to the next stage, `RECV_F` input from the one before, `SEND_B` gradient to the one before, `RECV_B` from the next;
    `OVERLAP_F_B` holds an F and a B of different micro-batches in `parts`, which may run together (its stage and micro_batch are -1).
    `str(action)` is spelled as in torch.distributed.pipelining: 2F1, 0SEND_F3, (0F4;7B1)OVERLAP_F_B.
    """

    kind: str
    stage: int
    micro_batch: int
    parts: tuple["Action", ...] = ()

    def flat(self) -> tuple["Action", ...]:
        """Its parts, or itself."""
        return self.parts or (self,)

    def __str__(self) -> str:
        if self.parts:
            return f"({';'.join(map(str, self.parts))}){self.kind}"
        return f"{self.stage}{self.kind}{self.micro_batch}"


class Value(NamedTuple):
    """What passes between stages: the output of a forward (`F`) or the input gradient of a backward (`B`), named by its producer."""

    kind: str
    stage: int
    micro_batch: int


def product(action: Action) -> Value | None:
    """What one part makes for another stage, which need not exist; W makes nothing."""
    return None if action.kind == "W" else Value("F" if action.kind == "F" else "B", action.stage, action.micro_batch)


def need(action: Action, stages: int) -> Value | None:
    """What one part needs of another stage; None for the first forward, the last backward, and W."""
    if action.kind == "F" and action.stage > 0:
        return Value("F", action.stage - 1, action.micro_batch)
    if action.kind in "BI" and action.stage < stages - 1:
        return Value("B", action.stage + 1, action.micro_batch)
    return None


def stage_rank(stage: int, *, ranks: int, placement: Placement) -> int:
    """The rank along pp that holds `stage`: `loop` goes round and round, `v` down and up again."""
    lap, place = divmod(stage, ranks)
    return ranks - 1 - place if placement == "v" and lap % 2 else place


@dataclass(frozen=True, eq=False)
class Schedule:
    """The compute actions of every rank along pp, in order.

    Two schedules are equal only if they are the same object, so that what is computed from one can be cached.
    """

    kind: str
    ranks: int
    stages: int
    micro_batches: int
    placement: Placement
    actions: tuple[tuple[Action, ...], ...]

    def stage_rank(self, stage: int) -> int:
        """The rank along pp that holds `stage`."""
        return stage_rank(stage, ranks=self.ranks, placement=self.placement)

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """The stages that `rank` holds, first to last."""
        return tuple(stage for stage in range(self.stages) if self.stage_rank(stage) == rank)

    @property
    def virtual_stages(self) -> int:
        """Stages per rank."""
        return self.stages // self.ranks
