"""Pipeline schedules on every kind, size and number of micro-batches: complete, in order, without deadlock, within the memory promised."""

from collections import Counter, deque
from itertools import product

import pytest

from llmtrain.errors import UserError
from llmtrain.layout.schedule import KINDS, Action, bubble, build, forward_only, peak_activations, resolve, stage_rank, with_communication
from llmtrain.layout.schedule_orders import rounds

MICRO_BATCHES = (1, 2, 3, 5, 8, 11, 16, 32)
PAIRS = "interleaved, pairs"
VIRTUAL = {"gpipe": (1, 2, 3, 4), "1f1b": (1,), "interleaved": (2, 3, 4), "zero_bubble": (1, 2, 3, 4), "zbv": (2,), "dualpipev": (2,)}
VIRTUAL[PAIRS] = (2, 3)
CASES = [(kind, p, v) for kind in (*KINDS, PAIRS) for p in range(1, 9) for v in VIRTUAL[kind]]
STEP = {"F": 1, "B": -1}


def schedules(kind: str, p: int, v: int):
    for n in MICRO_BATCHES:
        if kind != "dualpipev" or n >= 2 * p:
            yield build(kind.partition(",")[0], ranks=p, virtual_stages=v, micro_batches=n, pairs=kind == PAIRS)


class Machine:
    """Ranks that carry out their lists. Sends into channels that keep their order; `together` makes both sides meet at a transfer."""

    def __init__(self, schedule, *, together: bool):
        self.schedule, self.together = schedule, together
        self.lists = [deque(actions) for actions in with_communication(schedule)]
        self.here = [set() for _ in self.lists]
        self.channels = {pair: deque() for pair in product(range(schedule.ranks), repeat=2)}
        self.done = [set() for _ in self.lists]

    def run(self) -> None:
        """To the end of all lists, or until all ranks wait."""
        moved = True
        while moved:
            moved = sum(self.step(rank) for rank in range(len(self.lists)))
        assert not any(self.lists), {rank: str(actions[0]) for rank, actions in enumerate(self.lists) if actions}
        assert not any(self.channels.values())

    def step(self, rank: int) -> bool:
        """Carry out the next action of `rank`; False if it must wait."""
        if not self.lists[rank]:
            return False
        action = self.lists[rank][0]
        if action.kind.startswith("SEND"):
            moved = self.send(rank, action)
        elif action.kind.startswith("RECV"):
            moved = not self.together and self.receive(rank, action)
        else:
            for part in action.flat():
                self.need(rank, part)
            for part in action.flat():
                self.compute(rank, part)
            moved = True
        if moved:
            self.lists[rank].popleft()
        return moved

    def send(self, rank: int, action: Action) -> bool:
        kind = action.kind[-1]
        target = self.schedule.stage_rank(action.stage + STEP[kind])
        assert target != rank and self.schedule.stage_rank(action.stage) == rank
        value = (kind, action.stage, action.micro_batch)
        assert value in self.here[rank], f"{action} on {rank} sends what it has not made"
        if not self.together:
            self.channels[rank, target].append(value)
            return True
        other = self.lists[target][0] if self.lists[target] else None
        if other != Action(f"RECV_{kind}", action.stage + STEP[kind], action.micro_batch):
            return False
        self.here[target].add(value)
        self.lists[target].popleft()
        return True

    def receive(self, rank: int, action: Action) -> bool:
        kind = action.kind[-1]
        source = self.schedule.stage_rank(action.stage - STEP[kind])
        channel = self.channels[source, rank]
        if not channel:
            return False
        value = channel.popleft()
        assert value == (kind, action.stage - STEP[kind], action.micro_batch), f"{action} on {rank} meets {value}"
        self.here[rank].add(value)
        return True

    def need(self, rank: int, part: Action) -> None:
        """Everything that `part` uses is on this rank."""
        stage, m, last = part.stage, part.micro_batch, self.schedule.stages - 1
        assert self.schedule.stage_rank(stage) == rank
        if part.kind == "F":
            assert stage == 0 or ("F", stage - 1, m) in self.here[rank]
        elif part.kind in "BI":
            assert ("F", stage, m) in self.done[rank] and (stage == last or ("B", stage + 1, m) in self.here[rank]), str(part)
        else:
            assert part.kind == "W" and ("I", stage, m) in self.done[rank]

    def compute(self, rank: int, part: Action) -> None:
        assert part[:3] not in self.done[rank], f"{part} twice"
        self.done[rank].add(part[:3])
        if part.kind in "FBI":
            self.here[rank].add(("F" if part.kind == "F" else "B", part.stage, part.micro_batch))


@pytest.mark.parametrize(("kind", "p", "v"), CASES)
def test_runs_to_the_end(kind, p, v):
    """With sends that never wait, and with both sides waiting for each other at every transfer, on one queue per rank."""
    for schedule in schedules(kind, p, v):
        for together in (False, True):
            machine = Machine(schedule, together=together)
            machine.run()
            for rank, done in enumerate(machine.done):
                counts = Counter((kind, stage) for kind, stage, _ in done)
                for stage in schedule.stages_of(rank):
                    assert counts["F", stage] == schedule.micro_batches
                    assert counts["B", stage] + counts["I", stage] == schedule.micro_batches
                    assert counts["I", stage] == counts["W", stage]
                assert sum(counts.values()) == len(done) == sum(len(a.flat()) for a in schedule.actions[rank])


@pytest.mark.parametrize(("kind", "p", "v"), [case for case in CASES if case[1] in (1, 2, 5)])
def test_forwards_alone_run_to_the_end(kind, p, v):
    trained = next(schedules(kind, p, v))
    for n in (1, 4, 9):
        schedule = forward_only(trained, micro_batches=n)
        for together in (False, True):
            machine = Machine(schedule, together=together)
            machine.run()
            assert [len(done) for done in machine.done] == [v * n] * p
        assert forward_only(trained).micro_batches == trained.micro_batches


@pytest.mark.parametrize(("kind", "p", "v"), [case for case in CASES if case[1] in (2, 3, 8)])
def test_both_sides_of_a_pair_see_the_same_order(kind, p, v):
    for schedule in schedules(kind, p, v):
        seen = {pair: [] for pair in product(range(p), repeat=2)}
        for rank, actions in enumerate(with_communication(schedule)):
            for action in actions:
                if "_" in action.kind and not action.parts:
                    back = action.kind.startswith("RECV")
                    stage = action.stage - STEP[action.kind[-1]] if back else action.stage
                    peer = schedule.stage_rank(stage if back else stage + STEP[action.kind[-1]])
                    seen[rank, peer].append((action.kind[-1], stage, action.micro_batch))
        assert all(seen[a, b] == seen[b, a] for a, b in seen)
        if schedule.placement == "loop":
            assert sum(map(len, seen.values())) == 2 * 2 * (schedule.stages - 1) * schedule.micro_batches
        else:  # the turn needs no transfer
            assert sum(map(len, seen.values())) == 2 * 2 * (schedule.stages - 2) * schedule.micro_batches


@pytest.mark.parametrize(("kind", "p", "v"), CASES)
def test_micro_batches_of_a_stage_ascend(kind, p, v):
    for schedule in schedules(kind, p, v):
        for actions in schedule.actions:
            order = {}
            for part in (part for action in actions for part in action.flat()):
                order.setdefault(("B" if part.kind == "I" else part.kind, part.stage), []).append(part.micro_batch)
            assert all(sorted(found) == found for found in order.values())


def promised(kind: str, p: int, v: int, n: int, rank: int) -> int:
    """Most activations that a rank may hold, counted in stages x micro-batches."""
    group = rounds(n, p)[0]
    return {
        "gpipe": v * n,
        "1f1b": min(n, p - rank),
        "interleaved": min(n * v, (v - 1) * group + 2 * (p - 1 - rank) + 1),
        PAIRS: min(n * v, (v - 1) * group + 2 * (p - 1 - rank) + 2),
        "zero_bubble": min(n * v, (v - 1) * group + p),
        "zbv": min(2 * n, 2 * p),
        "dualpipev": min(2 * n, 2 * p + 1),
    }[kind]


@pytest.mark.parametrize(("kind", "p", "v"), CASES)
def test_activations_held_are_as_promised(kind, p, v):
    for schedule in schedules(kind, p, v):
        n, peaks = schedule.micro_batches, peak_activations(schedule)
        most = tuple(promised(kind, p, v, n, rank) for rank in range(p))
        if kind == "zbv" and n < 2 * p - 1:  # a pipeline that is never full
            assert all(peak <= bound for peak, bound in zip(peaks, most))
        else:
            assert peaks == most


def test_a_receive_comes_as_late_as_the_order_lets_it():
    first, second = with_communication(build("1f1b", ranks=2, virtual_stages=1, micro_batches=3))
    assert " ".join(map(str, first)) == "0F0 0SEND_F0 0F1 0SEND_F1 0RECV_B0 0B0 0F2 0RECV_B1 0SEND_F2 0B1 0RECV_B2 0B2"
    assert " ".join(map(str, second)) == "1RECV_F0 1F0 1B0 1RECV_F1 1SEND_B0 1F1 1B1 1SEND_B1 1RECV_F2 1F2 1B2 1SEND_B2"


def test_neighbours_on_one_rank_exchange_nothing():
    for kind, v in (("interleaved", 3), ("zbv", 2)):
        schedule = build(kind, ranks=1, virtual_stages=v, micro_batches=4)
        assert with_communication(schedule) == schedule.actions


def test_stages_lie_in_loops_or_on_a_v():
    loop = build("interleaved", ranks=4, virtual_stages=2, micro_batches=4)
    v = build("zbv", ranks=4, virtual_stages=2, micro_batches=4)
    assert [loop.stages_of(rank) for rank in range(4)] == [(0, 4), (1, 5), (2, 6), (3, 7)]
    assert [v.stages_of(rank) for rank in range(4)] == [(0, 7), (1, 6), (2, 5), (3, 4)]
    assert (loop.stage_rank(6), v.stage_rank(6), v.virtual_stages) == (2, 1, 2)
    assert [stage_rank(stage, ranks=2, placement="v") for stage in range(7)] == [0, 1, 1, 0, 0, 1, 1]


def test_names_are_torchs():
    pair = Action("OVERLAP_F_B", -1, -1, (Action("F", 0, 4), Action("B", 7, 1)))
    assert [str(Action("F", 2, 1)), str(Action("SEND_F", 0, 3)), str(pair)] == ["2F1", "0SEND_F3", "(0F4;7B1)OVERLAP_F_B"]


def test_the_same_request_gives_the_same_object():
    assert build("zbv", ranks=2, virtual_stages=2, micro_batches=4) is build("zbv", ranks=2, virtual_stages=2, micro_batches=4)


def test_rounds_are_even_and_no_shorter_than_the_pipeline():
    assert rounds(16, 8) == [8, 8] and rounds(10, 4) == [5, 5] and rounds(11, 4) == [6, 5] and rounds(3, 4) == [3]


def test_auto_follows_the_stages_per_rank():
    assert [resolve("auto", 1), resolve("auto", 2), resolve("zbv", 2)] == ["1f1b", "interleaved", "zbv"]
    assert build("auto", ranks=2, virtual_stages=3, micro_batches=4).kind == "interleaved"


@pytest.mark.parametrize(
    ("kind", "p", "v", "n", "says"),
    [
        ("1f1b", 4, 2, 8, r"parallel\.virtual_stages 2.*interleaved"),
        ("interleaved", 4, 1, 8, r"parallel\.virtual_stages 1.*1f1b"),
        ("zbv", 4, 3, 8, r"parallel\.virtual_stages 3.*set parallel\.virtual_stages to 2"),
        ("dualpipev", 4, 1, 8, r"set parallel\.virtual_stages to 2"),
        ("dualpipev", 4, 2, 7, r"2 x 4 = 8 micro-batches.*train\.global_batch / \(train\.micro_batch x dp\) gives 7"),
        ("zigzag", 4, 2, 7, r"parallel\.schedule 'zigzag'.*gpipe, 1f1b"),
        ("gpipe", 4, 1, 0, r"0 micro-batches"),
        ("1f1b, pairs", 4, 1, 8, r"overlap_micro_batches: schedule 1f1b has no pairs.*dualpipev or interleaved"),
    ],
)
def test_impossible_combinations_name_the_options(kind, p, v, n, says):
    kind, pairs, _ = kind.partition(", pairs")
    with pytest.raises(UserError, match=says):
        build(kind, ranks=p, virtual_stages=v, micro_batches=n, pairs=bool(pairs))


def test_pairs_take_no_more_time_than_their_halves_one_after_the_other_and_cost_one_activation():
    plain, paired = (build("interleaved", ranks=8, virtual_stages=2, micro_batches=16, pairs=pairs) for pairs in (False, True))
    assert bubble(paired) == pytest.approx(bubble(plain))
    assert [b - a for a, b in zip(peak_activations(plain), peak_activations(paired))] == [1] * 8
    parts = [action.parts for actions in paired.actions for action in actions if action.parts]
    assert len(parts) == 128 and all(forward.micro_batch != backward.micro_batch for forward, backward in parts)
