"""When the actions of a schedule run: bubbles against closed forms, uneven stages, the picture, and the tables of docs/pipeline.md."""

from dataclasses import replace
from pathlib import Path

import pytest

from llmtrain.layout.schedule import Times, bubble, build, draw, peak_activations, simulate

DOCS = Path(__file__).resolve().parents[2] / "docs" / "pipeline.md"
TABLE = [
    ("gpipe", 1),
    ("1f1b", 1),
    ("interleaved", 2),
    ("interleaved", 6),
    ("zero_bubble", 1),
    ("zero_bubble", 2),
    ("zbv", 2),
    ("dualpipev", 2),
]


def test_six_virtual_stages_take_the_bubble_from_30_to_7_per_cent():
    """Pangu Ultra: p = 8, n = 16. The definition is waiting over the whole time, so (p - 1) / (p - 1 + n v)."""
    assert bubble(build("1f1b", ranks=8, virtual_stages=1, micro_batches=16)) == pytest.approx(0.3043, abs=1e-4)
    assert bubble(build("interleaved", ranks=8, virtual_stages=6, micro_batches=16)) == pytest.approx(0.0680, abs=1e-4)


@pytest.mark.parametrize(("p", "n"), [(1, 4), (2, 3), (4, 4), (4, 7), (4, 12), (8, 8), (8, 19), (8, 24)])
def test_closed_forms(p, n):
    one = (p - 1) / (p - 1 + n)
    assert bubble(build("gpipe", ranks=p, virtual_stages=1, micro_batches=n), forward=1, backward=3) == pytest.approx(one)
    assert bubble(build("1f1b", ranks=p, virtual_stages=1, micro_batches=n)) == pytest.approx(one)
    for v in (2, 3):
        schedule = build("interleaved", ranks=p, virtual_stages=v, micro_batches=n)
        assert bubble(schedule) == pytest.approx((p - 1) / (p - 1 + n * v))


@pytest.mark.parametrize(("p", "n"), [(2, 4), (4, 7), (4, 8), (8, 16), (8, 19), (8, 32)])
def test_zero_bubble_waits_for_a_third_and_with_two_stages_for_a_sixth(p, n):
    """With F, I and W one unit each, ZB-H1 waits (p - 1) units of 3 n computed; two stages per rank halve the wait."""
    schedule = build("zero_bubble", ranks=p, virtual_stages=1, micro_batches=n)
    assert bubble(schedule) == pytest.approx((p - 1) / (p - 1 + 3 * n))
    for kind in ("zero_bubble", "zbv"):
        schedule = build(kind, ranks=p, virtual_stages=2, micro_batches=n)
        assert bubble(schedule) == pytest.approx((p - 1) / (p - 1 + 6 * n))


@pytest.mark.parametrize(("p", "n"), [(2, 4), (4, 8), (4, 20), (8, 16)])
def test_dualpipev_waits_for_whole_pairs(p, n):
    """Its paper: a rank waits (p - 1) (F&B + B - 3 W), here in stages of half a rank: F&B 3, B 2, W 1 give 2 (p - 1) units of 6 n."""
    schedule = build("dualpipev", ranks=p, virtual_stages=2, micro_batches=n)
    assert bubble(schedule) == pytest.approx(2 * (p - 1) / (2 * (p - 1) + 6 * n))


def test_pairs_that_overlap_save_time():
    schedule = build("dualpipev", ranks=4, virtual_stages=2, micro_batches=20)
    apart, together = simulate(schedule), simulate(schedule, Times(overlapped=2.0))
    assert max(rank[-1].end for rank in together) < 0.75 * max(rank[-1].end for rank in apart)


def test_a_stage_that_takes_longer_holds_up_the_others():
    """Two ranks, the second twice as slow: it works without a pause from the first forward on, the other half the time."""
    schedule = build("1f1b", ranks=2, virtual_stages=1, micro_batches=6)
    spans = simulate(schedule, Times(stages=(1.0, 2.0)))
    assert [rank[-1].end for rank in spans] == [39.0, 37.0] and spans[1][0].start == 1.0
    assert bubble(schedule, stage_costs=(1.0, 2.0)) == pytest.approx(1 - (6 * 3 + 6 * 6) / (2 * 39))


def test_weights_may_cost_more_than_inputs():
    schedule = build("zero_bubble", ranks=2, virtual_stages=1, micro_batches=1)
    first, second = simulate(schedule, Times(forward=1.0, backward=5.0, weights=3.0))
    assert [(str(span.action), span.start, span.end) for span in second] == [("1F0", 1, 2), ("1I0", 2, 4), ("1W0", 4, 7)]
    assert [(str(span.action), span.start, span.end) for span in first] == [("0F0", 0, 1), ("0I0", 4, 6), ("0W0", 6, 9)]


def test_costs_of_another_number_of_stages_are_refused():
    with pytest.raises(ValueError, match="3 given for 2 stages"):
        bubble(build("1f1b", ranks=2, virtual_stages=1, micro_batches=2), stage_costs=(1, 1, 1))


def test_lists_that_wait_for_each_other_are_found():
    schedule = build("1f1b", ranks=2, virtual_stages=1, micro_batches=2)
    first, second = schedule.actions
    with pytest.raises(ValueError, match="never ends: 0B0, 1F1"):
        simulate(replace(schedule, actions=((first[0], *first[2:], first[1]), (second[0], second[2], second[1], second[3]))))


def test_the_picture():
    assert draw(build("1f1b", ranks=2, virtual_stages=1, micro_batches=2)).splitlines() == [
        "rank 0  F0 F1 .  .  B0 -  .  B1 -",
        "rank 1  .  F0 B0 -  F1 B1 -  .  .",
    ]
    pairs = draw(build("dualpipev", ranks=1, virtual_stages=2, micro_batches=2)).split()
    assert pairs[2:] == ["0F0", "1F0", "0F1", "1B0", "-", "1F1", "+0B0", "-", "1B1", "-", "0I1", "0W1"]


def table() -> str:
    lines = ["| schedule | virtual stages | bubble | activations held, rank 0 to 7 |", "|---|---|---|---|"]
    for kind, v in TABLE:
        schedule = build(kind, ranks=8, virtual_stages=v, micro_batches=16)
        held = " ".join(f"{peak / v:.4g}" for peak in peak_activations(schedule))
        lines.append(f"| `{kind}` | {v} | {bubble(schedule):.1%} | {held} |")
    return "\n".join(lines)


def pictures() -> list[str]:
    sizes = [("1f1b", 4, 1, 6), ("interleaved", 3, 2, 3), ("zero_bubble", 4, 1, 6), ("zbv", 3, 2, 5), ("dualpipev", 2, 2, 4)]
    shown = [draw(build(kind, ranks=p, virtual_stages=v, micro_batches=n)) for kind, p, v, n in sizes]
    return [*shown, draw(build("interleaved", ranks=2, virtual_stages=2, micro_batches=4, pairs=True))]


def test_docs_show_what_the_code_gives():
    text = DOCS.read_text()
    assert table() in text, table()
    for picture in pictures():
        shown = "\n".join(f"    {line}" for line in picture.splitlines())
        assert shown in text, shown
