"""Plans of which device holds which experts, against every other placement of small layers, and moves carried out on lists."""

import json
import math
import random
from itertools import combinations, permutations
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtrain.config.train import ExpertPlacementConfig
from llmtrain.layout.placement import Planner, balanced, device_loads, home, place, plan, route, variation

PAGE = (Path(__file__).parents[2] / "docs" / "expert-placement.md").read_text()


def test_variation_is_std_over_mean():
    assert variation([1.0, 3.0]) == 0.5 and variation([2.0, 2.0, 2.0]) == 0.0 and variation([0.0, 0.0]) == 0.0


def test_the_rule_by_hand():
    """16 goes to device 0, 8 to device 1, 4 to device 1 too (8 < 16), where it is now, and fills it; 1 goes to device 0."""
    assert balanced([16, 8, 4, 1], home(4), 2) == [0, 3, 2, 1]
    assert device_loads([16, 8, 4, 1], [0, 3, 2, 1], 2) == [17, 12]
    # Home has 24 and 5: std over mean is 9.5 / 14.5, afterwards 2.5 / 14.5.
    found = plan([16, 8, 4, 1], home(4), 2, gain=0.08)
    assert found.slots == [0, 3, 2, 1] and (found.before, found.after) == pytest.approx((9.5 / 14.5, 2.5 / 14.5))


def test_of_equal_devices_an_expert_stays_where_it_is():
    assert balanced([5, 5, 5, 5], [2, 0, 3, 1], 2) == [2, 0, 3, 1]
    assert balanced([9, 1, 1, 9], [0, 1, 2, 3], 2) == [0, 1, 2, 3]
    assert balanced([9, 1, 1, 9], [2, 1, 0, 3], 2) == [2, 1, 3, 0], "the first 9 stays, the other has to go, and a 1 makes room for it"


def test_a_layer_moves_only_if_the_variation_falls_by_the_gain():
    loads = [10, 9, 8, 9]  # home has 19 and 17, a variation of 1 / 18; 10 + 8 and 9 + 9 have none
    assert plan(loads, home(4), 2, gain=1 / 18 + 1e-12) is None
    assert plan(loads, home(4), 2, gain=1 / 18 - 1e-12).after == 0.0
    assert plan([3, 3, 3, 3], home(4), 2, gain=0.0) is None, "nothing falls"


@given(
    loads=st.lists(st.integers(0, 50), min_size=8, max_size=8),
    order=st.permutations(range(8)),
    devices=st.sampled_from([1, 2, 4, 8]),
)
@settings(max_examples=100, deadline=None)
def test_every_expert_has_a_slot_of_its_own_and_moves_no_more_than_it_must(loads, order, devices):
    slots = balanced(loads, order, devices)
    held = 8 // devices
    assert sorted(slots) == list(range(8))
    assert all(new == old for new, old in zip(slots, order) if new // held == old // held)


def test_greedy_is_close_to_the_best_of_all_placements():
    """8 experts on 2 devices: over 200 draws of skewed loads the fullest device is never above 4/3 of the best possible one."""
    draw, worst, home_worst = random.Random(0), 0.0, 0.0
    for _ in range(200):
        loads = [draw.paretovariate(1.2) for _ in range(8)]
        best = min(max(sum(loads[e] for e in chosen), sum(loads) - sum(loads[e] for e in chosen)) for chosen in combinations(range(8), 4))
        worst = max(worst, max(device_loads(loads, balanced(loads, home(8), 2), 2)) / best)
        home_worst = max(home_worst, max(device_loads(loads, home(8), 2)) / best)
    assert 1 <= worst < 4 / 3 < home_worst


def test_rows_of_a_device_are_shared_out_as_fsdp_does():
    assert [place(slot, held=5, shards=2) for slot in range(5, 10)] == [(1, 0, 0), (1, 0, 1), (1, 0, 2), (1, 1, 0), (1, 1, 1)]
    assert [place(slot, held=1, shards=2) for slot in (0, 1)] == [(0, 0, 0), (1, 0, 0)], "the second shard has none"


def moved(before: list[int], after: list[int], *, devices: int, shards: int) -> tuple[dict, int]:
    """The stacks of all ranks, lists of experts, after every rank has followed its route; and how many rows were sent."""
    held = len(before) // devices
    stacks: dict = {(d, s): {} for d in range(devices) for s in range(shards)}
    for expert, slot in enumerate(before):
        where = place(slot, held=held, shards=shards)
        stacks[where[:2]][where.row] = expert
    routes = {at: route(before, after, devices=devices, shards=shards, device=at[0], shard=at[1]) for at in stacks}
    rows, sent = {at: dict(stack) for at, stack in stacks.items()}, 0
    for number in range(2 if shards > 1 else 1):
        mail: dict = {}
        for at, way in routes.items():
            hop, queue = way.hops[number], [rows[at][row] for row in way.hops[number].order]
            sent += len(queue) if number == 0 else 0
            for to, count in enumerate(hop.sent):
                mail[at, (to, at[1]) if number == 0 else (at[0], to)], queue = queue[:count], queue[count:]
            assert queue == []
        axis = range(devices) if number == 0 else range(shards)
        for at, way in routes.items():
            parts = [mail[(other, at[1]) if number == 0 else (at[0], other), at] for other in axis]
            assert [len(part) for part in parts] == way.hops[number].arriving
            rows[at] = dict(enumerate(expert for part in parts for expert in part))
    for at, way in routes.items():
        assert len(rows[at]) == len(way.into)
        stacks[at] |= {row: rows[at][i] for i, row in enumerate(way.into)}
    return stacks, sent


@given(
    before=st.permutations(range(12)),
    after=st.permutations(range(12)),
    devices=st.sampled_from([1, 2, 3, 4, 12]),
    shards=st.sampled_from([1, 2, 3]),
)
@settings(max_examples=200, deadline=None)
def test_every_rank_gets_the_experts_that_are_to_be_there(before, after, devices, shards):
    stacks, sent = moved(before, after, devices=devices, shards=shards)
    for expert, slot in enumerate(after):
        where = place(slot, held=12 // devices, shards=shards)
        assert stacks[where[:2]][where.row] == expert
    assert sent == sum(a != b for a, b in zip(before, after)), "what stays is not sent"


def test_all_placements_of_four_experts():
    for before, after in permutations(permutations(range(4)), 2):
        stacks, _ = moved(list(before), list(after), devices=2, shards=1)
        assert all(stacks[slot // 2, 0][slot % 2] == expert for expert, slot in enumerate(after))


# --- the figures of docs/expert-placement.md ---------------------------------------------------------------------------------------------


def test_a_skewed_layer_gains_what_the_page_says():
    """256 experts on 32 devices, tokens of each log-normal; means over 100 draws."""
    rows = [(skew, *gained(skew)) for skew in (0.3, 0.6, 1.0)]
    shown = [f"| {skew:g} | {expert:.2f} | {a:.2f} | {b:.2f} | {c:.3f} | {d:.3f} |" for skew, expert, a, b, c, d in rows]
    assert [line for line in PAGE.splitlines() if line in shown] == shown, shown


def gained(skew: float) -> list[float]:
    """The fullest expert over the mean, the fullest device over the mean at home and planned, the variation at home and planned."""
    draw, found = random.Random(0), []
    for _ in range(100):
        loads = [math.exp(draw.gauss(0, skew)) for _ in range(256)]
        both = [device_loads(loads, slots, 32) for slots in (home(256), balanced(loads, home(256), 32))]
        found.append([max(loads) / sum(loads) * 256, *(max(t) / sum(t) * 32 for t in both), *map(variation, both)])
    return [sum(column) / len(found) for column in zip(*found)]


def test_loads_that_drift_are_followed_as_the_page_says():
    """64 experts on 8 devices, checked every 50 of 1,000 steps."""
    shown = []
    for half_life in (700, 350, 70):
        (at_home, planned), moves = drifted(memory=0.5 ** (1 / half_life))
        shown.append(f"| {half_life} | {at_home:.2f} | {planned:.2f} | {moves} |")
    assert [line for line in PAGE.splitlines() if line in shown] == shown, shown


def drifted(*, memory: float, skew: float = 0.6, choices: int = 32_768) -> tuple[list[float], int]:
    """Logarithms of the experts' loads wander; each step's counts are drawn about them. The fullest device over the mean, at home and
    planned, on average over the steps from the first check on; and how often experts moved."""
    draw, planner, moves, found = random.Random(0), Planner(ExpertPlacementConfig(), layers=1, experts=64, devices=8), 0, []
    level = [draw.gauss(0, skew) for _ in range(64)]
    for step in range(1000):
        moves += len(planner.check())
        weights = [math.exp(value) for value in level]
        means = [choices * weight / sum(weights) for weight in weights]
        counts = [max(0.0, draw.gauss(mean, math.sqrt(mean))) for mean in means]
        both = [device_loads(counts, slots, 8) for slots in (home(64), planner.slots[0])]
        found += [[max(tokens) / sum(tokens) * 8 for tokens in both]] if step >= 50 else []
        planner.add([counts])
        level = [memory * value + draw.gauss(0, skew * math.sqrt(1 - memory**2)) for value in level]
    return [sum(column) / len(found) for column in zip(*found)], moves


# --- from step to step -----------------------------------------------------------------------------------------------------------------


def test_averages_and_checks_by_hand():
    planner = Planner(ExpertPlacementConfig(every=2, ema=0.5, gain=0.08), layers=2, experts=4, devices=2)
    assert planner.check() == {}, "nothing is known yet"
    planner.add([[8, 8, 0, 0], [4, 4, 4, 4]])
    assert planner.check() == {}, "one step of two"
    planner.add([[0, 0, 0, 0], [4, 4, 4, 4]])
    assert planner.state()["averages"] == [[2.0, 2.0, 0.0, 0.0], [3.0] * 4]
    found = planner.check()
    assert found.keys() == {0} and (found[0].before, found[0].after) == (1.0, 0.0)
    assert planner.slots == [[0, 3, 2, 1], home(4)]


def test_a_resumed_planner_goes_on_alike_and_another_number_of_devices_keeps_the_averages():
    draw = random.Random(1)
    steps = [[[draw.paretovariate(1.5) for _ in range(8)]] for _ in range(40)]
    whole = Planner(ExpertPlacementConfig(every=4), layers=1, experts=8, devices=4)
    kept, seen = None, []
    for step, counts in enumerate(steps):
        if step == 22:
            kept = json.loads(json.dumps(whole.state()))
        whole.check()
        whole.add(counts)
        seen.append([list(slots) for slots in whole.slots])
    assert kept["slots"] != [home(8)] and seen[-1] != seen[21]
    again = Planner(ExpertPlacementConfig(every=4), layers=1, experts=8, devices=4)
    again.load_state(kept)
    for step, counts in enumerate(steps[22:], 22):
        again.check()
        again.add(counts)
        assert again.slots == seen[step]
    other = Planner(ExpertPlacementConfig(every=4), layers=1, experts=8, devices=2)
    other.load_state(kept)
    assert other.slots == [home(8)] and other.state()["averages"] == kept["averages"]
