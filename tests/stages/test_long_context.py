"""Phases of growing length, 64 -> 128 -> 512 -> 1,024, with Pangu Ultra's RoPE bases: on one rank and two, resumed across borders."""

import shutil

import pytest

PHASES = """
extends: base.yaml
precision: fp64
model: {max_seq_len: 1024, norm: {c_attention: 0.283, c_ffn: 0.432}}
data: {validation: [plays-validation]}
train:
  steps: null
  recompute: full
  loss_chunk: 128
  seq_len: 64
  validate_samples: 4
  phases:
    - {name: a, steps: 3, seq_len: 64, batch: 16, micro_batch: 4, rope_base: 1e4}
    - {name: b, steps: 3, seq_len: 128, batch: 8, micro_batch: 2, rope_base: 1e5}
    - {name: c, steps: 3, seq_len: 512, batch: 4, micro_batch: 1, rope_base: 1.6e6}
    - {name: d, steps: 2, seq_len: 1024, batch: 2, micro_batch: 1, rope_base: 2.56e7}
checkpoint: {every: 1, keep_last: 20}
"""
BORDERS = {"a": (1, 3), "b": (4, 6), "c": (7, 9), "d": (10, 11)}


@pytest.fixture(scope="module")
def one(lab):
    (lab.folder / "long.yaml").write_text(PHASES)
    return lab.train("long", config="long.yaml")


def test_phases_follow_each_other(one):
    phases = [line["phase"] for line in one.lines("train")]
    assert {name: (phases.index(name) + 1, len(phases) - phases[::-1].index(name)) for name in BORDERS} == BORDERS
    assert [line["samples"] for line in one.lines("train")][:4] == [[0, 16], [16, 16], [32, 16], [48, 8]]
    assert one.lines("train")[-1]["tokens"] == 3 * 1024 + 3 * 1024 + 3 * 2048 + 2 * 2048
    for base in ("10000", "100000", "1.6e+06", "2.56e+07"):
        assert f"RoPE base {base}," in one.out
    assert one.losses()[-1] < one.losses()[0]


def test_two_ranks_have_the_losses_of_one(lab, one):
    two = lab.train("long-two", "--parallel.dp_shard", "2", config="long.yaml")
    for step, (loss, norm) in one.values().items():
        assert two.values()[step] == pytest.approx((loss, norm), rel=1e-10), step


def test_the_base_changes_at_the_border_and_nowhere_before(lab, one):
    """Runs that go on from the end of phase b, with another base in c: the first step of c differs; with another base in d, c does not."""
    for name, change in (("c", "--train.phases.2.rope_base"), ("d", "--train.phases.3.rope_base")):
        lab.copy(one, f"long-base-{name}", newest=6)
        other = lab.train(f"long-base-{name}", change, "1e4", config="long.yaml").values()
        first = BORDERS[name][0]
        assert all(other[step] == one.values()[step] for step in range(7, first))
        assert other[first] != one.values()[first]


@pytest.mark.parametrize("newest", [6, 8])
def test_a_run_resumed_at_or_before_a_border_goes_on_bit_for_bit(lab, one, newest):
    lab.copy(one, f"long-resumed-{newest}", newest=newest)
    resumed = lab.train(f"long-resumed-{newest}", config="long.yaml")
    assert resumed.resumed() == newest and resumed.values() == one.values()


def test_learned_positions_are_refused_beyond_their_number(lab, one):
    words = ("--model.position.kind", "learned", "--model.max_seq_len", "512")
    code, _, err = lab.command("train", "-c", "long.yaml", "--name", "learned", *words)
    assert code == 1 and "sequences of 1024 tokens exceed model.max_seq_len 512" in err
    shutil.rmtree(lab.folder / "runs" / "learned", ignore_errors=True)
