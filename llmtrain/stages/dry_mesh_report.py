"""What `--dry-run` says of a mesh of several ranks: groups, roles, bytes of a step, bubble."""

import time
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import NamedTuple

from llmtrain.config.run import RunConfig
from llmtrain.layout.mesh import MeshShape
from llmtrain.layout.pipeline import PipelinePlan
from llmtrain.layout.schedule import bubble
from llmtrain.layout.stages import costs
from llmtrain.layout.steps import Segment, StepPlan
from llmtrain.layout.traffic import Row, traffic
from llmtrain.stages.dry_mesh import Role, build_roles, check_groups, in_closed_form

GIB = 2**30
SPLIT_BACKWARD = ("zero_bubble", "zbv", "dualpipev")


class Built(NamedTuple):
    """A rank that was built, and what it sends in a step of the first segment."""

    rank: int
    role: Role
    rows: tuple[Row, ...]

    @property
    def alike(self) -> tuple:
        """Equal for ranks that hold and send the same."""
        role = self.role
        return tuple(blocks for _, blocks in role.stages), role.ends, role.parameters, role.state_bytes, self.rows

    @property
    def sent(self) -> float:
        """Bytes of a step."""
        return sum(row.bytes for row in self.rows)


def dry_mesh(cfg: RunConfig, plan: StepPlan, shape: MeshShape) -> None:
    """Print the groups of `shape`, the roles of its ranks as built, and what a step sends and waits.

    Raises UserError for a mesh that the model does not fit, RuntimeError where what is built differs from the arithmetic.
    """
    print(f"mesh of {shape.world:,} ranks: {shape.describe()}")
    _print_groups(shape)
    started, first = time.monotonic(), plan.segments[0]
    known = in_closed_form(cfg)
    built = [Built(rank, role, tuple(traffic(cfg, shape, first, rank=rank)) if known else ()) for rank, role in build_roles(cfg, shape)]
    seconds = time.monotonic() - started
    print(f"roles: {len(built)} ranks built on meta in {seconds:.0f} s, all of pp x tp at the first and the last data-parallel rank")
    _print_roles(shape, built)
    if not known:
        why = f"with adapters (lora.rank {cfg.lora.rank})" if cfg.lora.rank else f"for model.family {cfg.model.family}"
        print(f"  the bytes of a step are known for the built-in transformer, not {why}")
        return
    _print_step(first, max(built, key=lambda one: one.sent), shape)
    if shape.pp > 1:
        _print_pipeline(cfg, plan, shape, [one.rank for one in built])


def _print_groups(shape: MeshShape) -> None:
    print(f"  {'axis':14}{'groups':>8}{'ranks each':>12}  the group of rank 0")
    for axis, groups in check_groups(shape, experts=shape.ep > 1 or shape.etp > 1).items():
        print(f"  {axis:14}{len(groups):>8,}{len(groups[0].ranks):>12,}  {_shortened(shape.group(axis, 0).ranks)}")
    print(f"  every axis parts the {shape.world:,} ranks, and all of them make their groups in this order")


def _print_roles(shape: MeshShape, built: Sequence[Built]) -> None:
    axes = list(dict.fromkeys(row.axis for one in built for row in one.rows))
    heads = "".join(f"{axis:>13}" for axis in axes)
    print(f"  {'alike':>5} {'pp':>7} {'tp':>7} {'dp':>12}  {'blocks':18}{'parameters':>13}{'state':>13}" + heads)
    for alike in _by_alikeness(built):
        one, places = alike[0], [shape.place(other.rank) for other in alike]
        where = " ".join(f"{_spans({place[axis] for place in places}):>7}" for axis in ("pp", "tp"))
        ends = {place["dp_replicate"] + place["dp_shard"] + place["cp"] > 0 for place in places}
        dp = "first, last" if len(ends) == 2 else "last" if True in ends else "first" if shape.dp * shape.cp > 1 else "all"
        blocks = "+".join(str(blocks) for _, blocks in one.role.stages)
        sent = {axis: sum(row.bytes for row in one.rows if row.axis == axis) for axis in axes}
        print(
            f"  {len(alike):>5} {where} {dp:>12}  {blocks:18}{one.role.parameters:>13,}{_size(one.role.state_bytes):>13}"
            + "".join(f"{_size(sent[axis]):>13}" for axis in axes)
        )
    print("  state: parameters, gradients and two moments; by axis: what a rank sends in a step, in a ring")


def _print_step(segment: Segment, busiest: Built, shape: MeshShape) -> None:
    phase = segment.phase
    micros = segment.batch // (shape.dp * phase.micro_batch)
    print(
        f"a step of {phase.name}, {segment.batch:,} sequences of {phase.seq_len:,} tokens in {micros:,} micro-batches: "
        f"rank {busiest.rank} sends most"
    )
    for row in busiest.rows:
        print(f"  {row.axis:14}{row.kind:16}{row.calls:>10,} x {_size(row.bytes):>14} in all")


def _print_pipeline(cfg: RunConfig, plan: StepPlan, shape: MeshShape, ranks: Iterable[int]) -> None:
    pipeline = PipelinePlan.from_config(cfg)
    print(f"schedule {pipeline.kind}, {pipeline.stages} stages of {_runs(pipeline.layers)} blocks:")
    print(f"  {'phase':16}{'batch x tokens':>18}{'micro-batches':>15}{'bubble':>9}{'if even':>9}  most sent by a rank")
    for segment in plan.segments:
        phase = segment.phase
        micros = segment.batch // (shape.dp * phase.micro_batch)
        schedule = pipeline.schedule(micros)
        waits = bubble(schedule, stage_costs=costs(cfg.model, phase.seq_len).of_stages(pipeline.layers))
        most = max(sum(row.bytes for row in traffic(cfg, shape, segment, rank=rank)) for rank in ranks)
        batch = f"{segment.batch:,} x {phase.seq_len:,}"
        print(f"  {phase.name:16}{batch:>18}{micros:>15,}{waits:>9.1%}{bubble(schedule):>9.1%}  {_size(most)}")
    print("  bubble: the share of time in which ranks wait for each other, by the FLOPs of each stage, and if all stages cost the same")
    if pipeline.kind in SPLIT_BACKWARD and max(shape.tp, shape.cp, shape.ep) > 1:
        print(f"  {pipeline.kind} repeats collectives of tp, cp and ep in the second half of a backward pass; they are counted once")


def _by_alikeness(built: Sequence[Built]) -> list[list[Built]]:
    alike: dict[tuple, list[Built]] = {}
    for one in built:
        alike.setdefault(one.alike, []).append(one)
    return list(alike.values())


def _size(size: float) -> str:
    """In the largest unit of which there is one."""
    for unit, name in ((GIB, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if size >= unit:
            return f"{size / unit:,.2f} {name}"
    return f"{size:.0f} B"


def _shortened(ranks: Sequence[int]) -> str:
    return " ".join(map(str, ranks)) if len(ranks) <= 8 else f"{' '.join(map(str, ranks[:3]))} .. {ranks[-1]}"


def _spans(numbers: set[int]) -> str:
    """{0,1,2,5} -> `0-2,5`."""
    spans = []
    for _, run in groupby(enumerate(sorted(numbers)), key=lambda pair: pair[1] - pair[0]):
        inside = [number for _, number in run]
        spans.append(str(inside[0]) if len(inside) == 1 else f"{inside[0]}-{inside[-1]}")
    return ",".join(spans)


def _runs(layers: Sequence[int]) -> str:
    """(2, 2, 2, 1) -> `3 x 2, 1`."""
    runs = [(value, len(list(run))) for value, run in groupby(layers)]
    return ", ".join(f"{count} x {value}" if count > 1 else str(value) for value, count in runs)
