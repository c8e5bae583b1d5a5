"""The same step on sides that are right: places in order, nothing between equal sides, rounding within its bounds; files; the command."""

import json

import numpy as np
import pytest
import torch
from compare_faults import Fault, swapped_sign, wrong_scale
from safetensors.torch import load_file, save_file

from llmtrain.api import run
from llmtrain.config.run import RunConfig
from llmtrain.data.token_file import TokenWriter
from llmtrain.errors import UserError
from llmtrain.tools.compare.judge import compare
from llmtrain.tools.compare.measure import measure
from llmtrain.tools.compare.side import read_side, run_side
from llmtrain.tools.compare.table import chosen, text, verdict
from llmtrain.tools.compare.trace import KEY, Trace, load_trace, make_point, positions
from llmtrain.tools.compare.verb import main

BLOCK = ["attention_norm", *(f"attention.{name}" for name in ("q_proj", "k_proj", "v_proj", "q_norm", "k_norm"))]
BLOCK += ["rope", "rope.2", "attention", "attention.out_proj", "post_attention_norm"]
BLOCK += ["ffn_norm", "ffn.gate_proj", "ffn.up_proj", "ffn.swiglu", "ffn", "post_ffn_norm"]  # down_proj gives what ffn gives


def names(trace: Trace, phase: str) -> list[str]:
    return [point.name for point in trace.points if point.phase == phase]


def test_places_are_those_of_the_model_in_execution_order(plain):
    forward = [name for name in names(plain, "forward") if not name.endswith("]")]  # [1] is the second result of a fused op
    blocks = [f"blocks.{i}.{part}" for i in range(3) for part in BLOCK]
    wanted = ["embedding", *blocks, "final_norm", "head", "loss"]
    assert [name for name in forward if name not in ("blocks.0", "blocks.1", "blocks.2")] == wanted
    assert forward.index("blocks.1") == forward.index("blocks.1.post_ffn_norm") + 1
    backward = names(plain, "backward")
    order = ["head", "head.weight", "blocks.2.ffn.swiglu", "blocks.2.attention", "blocks.1.ffn.swiglu", "embedding", "embedding.weight"]
    assert sorted(order, key=backward.index) == order and backward[-1] == "gradient norm"
    weights = names(plain, "weights")
    assert set(weights) <= set(backward) and len(weights) == 3 * 13 + 3
    assert len({point.key for point in plain.points}) == len(plain.points)


def test_values_are_those_of_the_step(dense, plain):
    """The head's weight gradient, by hand from what was recorded: the final norm's output and the loss."""
    points, batch = plain.by_key(), dense.side().batch
    whole = run_side(dense.side(), limit=0).by_key()
    hidden = whole["forward", "final_norm"].values.view(-1, 32).double()
    weight = whole["weights", "head.weight"].values.view(97, 32).double().requires_grad_()
    loss = torch.nn.functional.cross_entropy(hidden @ weight.T, batch.targets.flatten())
    loss.backward()
    assert abs(loss.item() - points["forward", "loss"].values.item()) < 1e-6
    assert torch.allclose(whole["backward", "head.weight"].values.double(), weight.grad.flatten(), atol=1e-7)


def test_equal_sides_give_zeros(dense, plain):
    found = compare(plain, dense.trace())
    assert found.first is None and found.referenced and not found.only_a and not found.only_b
    assert {row.difference for row in found.rows} == {0.0} and found.settings() == []
    assert not [row.a for row in found.rows if row.unjudged]
    assert "within the bounds at all" in verdict(found)


def test_fast_and_reference_kernels_differ_within_the_bounds(dense, plain):
    words = "kernels.attention=reference kernels.rms_norm=reference kernels.rope=reference kernels.cross_entropy=reference"
    found = compare(plain, dense.trace(words))
    assert found.first is None, text(found)
    assert any(row.difference > 0 for row in found.rows) and max(row.difference for row in found.rows if row.a.shape) < 1e-5
    assert ("kernels.attention", "tiled", "reference") in found.settings()


@pytest.mark.parametrize("compute, low, high", [("bf16", 1e-3, 0.2), ("fp16", 1e-4, 0.02)])
def test_sixteen_bits_are_held_to_their_own_bound(dense, plain, compute, low, high):
    found = compare(plain, dense.trace(f"precision={compute}"))
    assert found.first is None, text(found)
    rows = {(row.a.phase, row.a.name): row for row in found.rows}
    for place in (("forward", "blocks.2"), ("backward", "blocks.0"), ("backward", "blocks.0.attention.q_proj.weight")):
        assert low < rows[place].difference < high and rows[place].a.off < 1e-5 < rows[place].bound_b, rows[place]


def test_a_fault_of_two_percent_shows_in_bf16(dense, plain, plant):
    """Larger than the format's own noise at the place where it is."""
    plant("attention", wrong_scale(Fault(), by=1.5))
    assert compare(plain, dense.trace("precision=bf16 kernels.attention=faulty")).first.a.name == "blocks.0.attention"


def test_recomputing_changes_nothing_and_is_recorded_once(dense, plain):
    again = dense.trace("train.recompute=full")
    found = compare(plain, again)
    assert len(again.points) == len(plain.points) and not found.only_a and {row.difference for row in found.rows} == {0.0}


def test_a_mixture_in_the_same_format_is_judged(mixture):
    trace = mixture.trace("kernels.attention=reference")
    found = compare(mixture.trace(), trace)
    assert found.first is None and "blocks.1.ffn.router.ids" in names(trace, "forward")
    assert sum(row.unjudged is not None for row in found.rows) == 0


def test_tokens_that_rounding_sends_elsewhere_excuse_what_follows(mixture):
    found = compare(mixture.trace(), mixture.trace("precision=bf16"))
    moved = [row.b.moved for row in found.rows if row.b.moved]
    assert moved, "this model sends no token elsewhere in bf16; the test needs another seed"
    assert found.first is None, verdict(found)
    excused = [row for row in found.rows if row.unjudged]
    assert excused and "tokens go to other experts" in excused[0].unjudged and "not judged" in text(found, everything=True)


def test_a_router_that_chooses_wrongly_is_found(mixture):
    right, wrong = mixture.trace(), mixture.trace()
    ids = wrong.by_key()["forward", "blocks.1.ffn.router.ids"]
    ids.values = (ids.values + 1) % 8
    side = mixture.side()
    measure(wrong, reference=mixture.auxiliary(side, "fp64"), control=mixture.auxiliary(side, "fp32"))
    found = compare(right, wrong)
    assert found.first.a.name == "blocks.1.ffn.router.ids" and "B sends 144 of 144 tokens to other experts" in verdict(found)


def test_positions_are_spread_over_every_column():
    at = positions(1_000_000, 4096)
    assert len(at) == 4096 == len(set(at.tolist())) and at.min() < 245 and at.max() >= 1_000_000 - 245 and (at.diff() > 0).all()
    assert len(set((at % 64).tolist())) == 64 and positions(4096, 4096) is None and positions(10**6, 0) is None
    assert len(make_point("x", "forward", torch.zeros(300, 300), limit=500).values) == 500


def test_few_values_still_show_a_fault(dense, plain, plant):
    plant("rope", swapped_sign(Fault()))
    traces = [run_side(dense.side(words), limit=64) for words in ("", "kernels.rope=faulty")]
    assert compare(*traces).first.a.name == "blocks.0.rope"


def test_without_a_reference_a_rule_of_thumb_judges(dense, plant):
    plant("attention", wrong_scale(Fault(lambda call: call == 1)))
    sides = [run_side(dense.side(words)) for words in ("", "kernels.rope=reference", "kernels.attention=faulty")]
    found = compare(sides[0], sides[1])
    assert not found.referenced and found.first is None and "rule of thumb" in text(found)
    assert compare(sides[0], sides[2]).first.a.name == "blocks.1.attention"


def test_files_keep_everything(dense, plain, plant, tmp_path):
    plant("rope", swapped_sign(Fault(lambda call: call == 3)))
    other = dense.trace("precision=bf16 kernels.rope=faulty")
    for name, trace in (("a", plain), ("b", other)):
        trace.save(tmp_path / f"{name}.safetensors")
    again = [load_trace(tmp_path / f"{name}.safetensors") for name in "ab"]
    assert text(compare(*again), everything=True) == text(compare(plain, other), everything=True)
    assert all(torch.equal(p.values, q.values) and p.values.dtype == q.values.dtype for p, q in zip(other.points, again[1].points))


def test_files_that_are_none_are_refused(plain, tmp_path):
    path = tmp_path / "side.safetensors"
    with pytest.raises(UserError, match=r"no such file.*compare record"):
        load_trace(path)
    path.write_bytes(b"\x80\x04not a record")
    with pytest.raises(UserError, match="cannot be read"):
        load_trace(path)
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(UserError, match="is no record of"):
        load_trace(path)
    save_file({"0": torch.zeros(2)}, path, metadata={KEY: json.dumps({"format": 99})})
    with pytest.raises(UserError, match="format 99; this version reads 1"):
        load_trace(path)
    plain.save(path)
    lacking = dict(list(load_file(path).items())[:-3])
    save_file(lacking, path, metadata={KEY: json.dumps({"format": 1, "meta": {}, "points": [{"name": "x"}]})})
    with pytest.raises(UserError, match="cannot be read"):
        load_trace(path)
    plain.save(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="cannot be read"):
        load_trace(path)


def test_other_batches_are_refused(dense, plain):
    with pytest.raises(UserError, match=r"different batches .rows 3 and 2.*--rows"):
        compare(plain, run_side(dense.side(rows=2)))
    with pytest.raises(UserError, match="different batches"):
        compare(plain, run_side(dense.side("seed=7")))
    with pytest.raises(UserError, match="--rows 10: allowed are 1 to 9"):
        dense.side(rows=10)
    with pytest.raises(UserError, match="--step 4: the configuration has steps 0 to 3"):
        dense.side(step=4)


def test_the_command(folder, plant, tmp_path, capsys):
    plant("attention", wrong_scale(Fault(lambda call: call % 3 == 2)))
    config, page = str(folder / "dense.yaml"), tmp_path / "page" / "compare.md"
    files = [str(tmp_path / f"{name}.safetensors") for name in "ab"]
    assert main(["record", "-c", config, "--out", files[0], "--kernels.rope", "reference"]) == 0
    assert main(["record", "-c", config, "--out", files[1], "--kernels.attention=faulty"]) == 0
    capsys.readouterr()
    assert main([*files, "--report", str(page)]) == 1
    out = capsys.readouterr().out
    assert "verdict: they part first at blocks.2.attention (forward) (kernels.attention: A tiled, B faulty): B is" in out
    assert "kernels.rope: A reference, B halves" in out and "blocks.2.attention  " in out and "<-- parts here" in out
    assert page.read_text().count("| blocks.") > 100 and page.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert main(["-c", config, "--a", "--kernels.rope reference", "--b", "device=cpu", "--rows", "2", "--train.seq_len", "16"]) == 0
    assert "step 0: 2 x 16 tokens of random tokens" in capsys.readouterr().out
    with pytest.raises(UserError, match="A and B are the same"):
        main(["-c", config, "--a", "device=cpu", "--b", "device=cpu"])


def test_a_run_is_compared_at_its_newest_checkpoint(folder, tmp_path):
    with TokenWriter(tmp_path / "tokens", np.uint16) as writer:
        for first in range(40):
            writer.add((first + np.arange(60)) % 97)
    words = {"data.train": [str(tmp_path / "tokens")], "output": str(tmp_path), "name": "trained", "train.steps": 3, "optim.lr": 0.01}
    assert run(RunConfig.load(folder / "dense.yaml", words)).done
    fresh = run_side(read_side(folder / "dense.yaml", [f"--data.train=[{tmp_path / 'tokens'}]"], "", step=2))
    trained = run_side(read_side(tmp_path / "trained", ["--train.steps", "4"], "", rows=9))
    assert trained.meta["step"] == 3 and fresh.meta["step"] == 2 and trained.meta["data"] == "data.train"
    assert trained.meta["loss"] < fresh.meta["loss"] - 0.05
    assert len(chosen(compare(trained, trained))) > 8
    with pytest.raises(UserError, match="is no run folder"):
        read_side(tmp_path, [], "")
