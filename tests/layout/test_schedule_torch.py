"""Compute lists against those that torch.distributed.pipelining's schedule objects hold, made over stages that are only numbers."""

import logging
from collections import Counter
from types import SimpleNamespace

import pytest

from llmtrain.layout.schedule import build, with_communication

schedules = pytest.importorskip("torch.distributed.pipelining.schedules")

CLASSES = {
    "gpipe": "ScheduleGPipe",
    "1f1b": "Schedule1F1B",
    "looped": "ScheduleLoopedBFS",
    "interleaved": "ScheduleInterleaved1F1B",
    "zero_bubble": "ScheduleInterleavedZeroBubble",
    "zbv": "ScheduleZBVZeroBubble",
    "dualpipev": "ScheduleDualPipeV",
}


def torchs(kind: str, *, ranks: int, virtual_stages: int, micro_batches: int) -> list[list[str]]:
    """Torch's order per rank, without its idle slots."""
    size = {"num_stages": ranks * virtual_stages, "group_size": ranks, "group_rank": 0, "is_last": False, "submod": None}
    numbers = [SimpleNamespace(stage_index=index * ranks, is_first=index == 0, **size) for index in range(virtual_stages)]
    order = getattr(schedules, CLASSES[kind])(numbers, micro_batches).pipeline_order
    return [[str(action) for action in order[rank] if action is not None] for rank in range(ranks)]


def ours(kind: str, **sizes: int) -> list[list[str]]:
    return [[str(a) for a in rank] for rank in build(kind, **sizes).actions]


@pytest.fixture(autouse=True)
def quiet():
    logging.getLogger("torch.distributed.pipelining").setLevel(logging.ERROR)


class RecordingStage(SimpleNamespace):
    """Stands for a stage that torch runs; writes down what it is told to compute."""

    def forward_one_chunk(self, micro_batch, *args, **kwargs):
        self.seen.append(f"{self.stage_index}F{micro_batch}")

    def backward_one_chunk(self, micro_batch, **kwargs):
        self.seen.append(f"{self.stage_index}B{micro_batch}")

    def nothing(self, *args):
        return []

    get_fwd_recv_ops = get_fwd_send_ops = get_bwd_recv_ops = get_bwd_send_ops = perform_reduce_grad = nothing


@pytest.mark.parametrize(("p", "n"), [(1, 1), (1, 4), (2, 2), (2, 5), (3, 8), (4, 4), (4, 16), (8, 16)])
@pytest.mark.parametrize("kind", ["gpipe", "1f1b"])
def test_what_torch_runs_with_one_stage_per_rank(kind, p, n):
    """What its loop calls, since the list beside it numbers the last rank's forwards of 1F1B from 1; needs n >= p, ours does not."""
    seen = []
    for rank in range(p):
        stage = RecordingStage(stage_index=rank, num_stages=p, group_size=p, group_rank=rank, is_last=rank == p - 1, seen=[])
        schedule = getattr(schedules, CLASSES[kind])(stage, n)
        schedule._initialize_stage = lambda *args: None
        schedule._has_backward = True
        schedule._step_microbatches([()] * n, [{}] * n)
        seen.append(stage.seen)
    assert ours(kind, ranks=p, virtual_stages=1, micro_batches=n) == seen


@pytest.mark.parametrize(
    ("p", "v", "n"), [(2, 2, 4), (2, 3, 6), (3, 2, 6), (4, 2, 3), (4, 2, 10), (4, 3, 8), (8, 2, 16), (8, 6, 16), (8, 4, 4)]
)
@pytest.mark.parametrize("kind", ["interleaved", "zero_bubble"])
def test_interleaved_kinds(kind, p, v, n):
    sizes = {"ranks": p, "virtual_stages": v, "micro_batches": n}
    assert ours(kind, **sizes) == torchs(kind, **sizes)


@pytest.mark.parametrize(("p", "n"), [(1, 3), (2, 4), (3, 6), (4, 2), (4, 8), (8, 16)])
def test_zero_bubble_with_one_stage_per_rank(p, n):
    sizes = {"ranks": p, "virtual_stages": 1, "micro_batches": n}
    assert ours("zero_bubble", **sizes) == torchs("zero_bubble", **sizes)


@pytest.mark.parametrize(("p", "n"), [(1, 1), (1, 4), (2, 1), (2, 4), (3, 7), (4, 3), (4, 7), (4, 10), (8, 15), (8, 32)])
def test_zbv(p, n):
    sizes = {"ranks": p, "virtual_stages": 2, "micro_batches": n}
    assert ours("zbv", **sizes) == torchs("zbv", **sizes)


@pytest.mark.parametrize(("p", "n"), [(1, 2), (1, 5), (2, 4), (2, 7), (3, 6), (4, 8), (4, 11), (8, 16), (8, 32)])
def test_dualpipev(p, n):
    sizes = {"ranks": p, "virtual_stages": 2, "micro_batches": n}
    assert ours("dualpipev", **sizes) == torchs("dualpipev", **sizes)


@pytest.mark.parametrize(("p", "v", "n"), [(2, 2, 4), (4, 3, 6)])
def test_gpipe_over_several_stages_differs_in_the_order_of_backwards_alone(p, v, n):
    """Torch takes the micro-batches of a stage backwards in descending order, ours ascend: those that wait longest go first."""
    sizes = {"ranks": p, "virtual_stages": v, "micro_batches": n}
    for mine, theirs in zip(ours("gpipe", **sizes), torchs("looped", **sizes)):
        half = v * n
        assert mine[:half] == theirs[:half]
        for start in range(half, 2 * half, n):
            assert mine[start : start + n] == theirs[start : start + n][::-1]


@pytest.mark.parametrize(
    ("kind", "p", "v", "n"), [("interleaved", 4, 2, 8), ("zero_bubble", 3, 2, 6), ("zbv", 4, 2, 8), ("dualpipev", 3, 2, 7)]
)
def test_torch_makes_the_same_transfers_and_can_run_ours(kind, p, v, n):
    """Torch's own lowering sends the same values between the same ranks, and its simulator finds no deadlock in our lists."""
    schedule = build(kind, ranks=p, virtual_stages=v, micro_batches=n)
    lists = {rank: [_as_torch(a) for a in actions] for rank, actions in enumerate(with_communication(schedule))}
    bare = {rank: [_as_torch(a) for a in actions] for rank, actions in enumerate(schedule.actions)}
    lowered = schedules._add_send_recv(bare, stage_to_rank=schedule.stage_rank, num_stages=schedule.stages)
    for rank in range(p):
        assert Counter(map(str, lists[rank])) == Counter(map(str, lowered[rank]))
    if not any(action.parts for rank in schedule.actions for action in rank):  # torch's simulator does not know pairs
        schedules._simulate_comms_compute(lists, lambda stage: schedule.stage_rank(stage), schedule.stages)


def _as_torch(action):
    if action.parts:
        return schedules._Action(-1, schedules.OVERLAP_F_B, None, tuple(map(_as_torch, action.parts)))
    return schedules._Action.from_str(str(action))
