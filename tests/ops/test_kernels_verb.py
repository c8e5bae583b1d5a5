"""`llmtrain kernels`."""

import json

import pytest
import torch

from llmtrain.errors import UserError
from llmtrain.ops import Call, Mask
from llmtrain.ops.registry import register, unregister
from llmtrain.tools import kernels_bench
from llmtrain.tools.kernels import main
from llmtrain.tools.kernels_bench import bench
from llmtrain.tools.kernels_shape import MAKERS, Shape

SMALL = ["--bench", "--device", "cpu", "--seq-len", "24", "--heads", "4", "--kv-heads", "2", "--head-dim", "8", "--rounds", "2"]


@pytest.fixture
def config(tmp_path):
    """A run of a small model with a window."""
    attention = "{heads: 4, kv_heads: 2, head_dim: 6, window: 9}"
    sections = [
        "device: cpu",
        "precision: bf16",
        f"model: {{hidden: 16, vocab_size: 50, attention: {attention}}}",
        "train: {seq_len: 20, micro_batch: 3}",
        "data: {document_mask: true}",
    ]
    path = tmp_path / "run.yaml"
    path.write_text("\n".join(sections))
    return str(path)


def test_the_table_names_choice_and_reason(capsys):
    assert main(["--device", "cpu", "--dtype", "fp64", "--lse"]) == 0
    lines = [line.split(maxsplit=3) for line in capsys.readouterr().out.splitlines()]
    assert ["attention", "reference", "chosen", "the fastest that serves"] in lines
    assert ["attention", "sdpa", "refused", "returns no log-sum-exp"] in lines
    assert ["attention", "fast_reference", "available"] in lines


def test_an_unknown_device_is_a_user_error():
    with pytest.raises(UserError, match="did you mean npu"):
        main(["--device", "npx"])


def measured(capsys, words):
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    return found, {row["name"]: row for row in found["rows"]}


def test_it_measures_what_serves(capsys):
    found, rows = measured(capsys, [*SMALL, "--documents", "3"])
    assert found["shape"]["hidden"] == 32 and found["dtype"] == "fp32" and found["rounds"] == 2
    assert rows["tiled"]["state"] == "chosen" and rows["flash_attn"]["why"] == "runs on cuda, not on cpu"
    for name in ("tiled", "sdpa", "reference", "fast_reference"):
        row = rows[name]
        assert row["forward"] > 0 and row["backward"] > 0 and 0 < row["error"] < 1e-6 and 0 < row["gradient_error"] < 1e-6
    assert rows["flash_attn"]["forward"] is None and rows["flash_attn"]["error"] is None


def test_a_table_of_the_same(capsys):
    assert main([*SMALL, "--forward", "--dtype", "bf16"]) == 0
    out = capsys.readouterr().out
    assert "shape: batch 1, seq len 24, heads 4, kv heads 2, head dim 8" in out
    (sdpa,) = [line.split() for line in out.splitlines() if line.startswith("attention  sdpa")]
    forward, rate, error = (float(cell) for cell in sdpa[3:])
    assert forward > 0 and rate > 0 and 1e-4 < error < 1e-2


def test_shapes_come_from_a_configuration_and_options_go_over_it(config, capsys):
    found, rows = measured(capsys, ["-c", config, "--bench", "--rounds", "1"])
    assert found["shape"] == {
        "batch": 3, "seq_len": 20, "heads": 4, "kv_heads": 2, "head_dim": 6, "value_head_dim": 6,
        "window": 9, "documents": 4, "hidden": 16, "ffn": 1024, "vocab": 50,
    }  # fmt: skip
    assert found["dtype"] == "bf16" and rows["sdpa"]["error"] > 1e-4
    found, _ = measured(capsys, ["-c", config, "--bench", "--rounds", "1", "--documents", "1", "--dtype", "fp32", "--train.seq_len", "30"])
    assert (found["shape"]["documents"], found["shape"]["seq_len"], found["dtype"]) == (1, 30, "fp32")


def test_the_table_of_a_configuration(config, capsys):
    assert main(["-c", config]) == 0
    assert "compute dtype: bf16" in capsys.readouterr().out


def test_every_op_with_a_benchmark_is_measured(capsys):
    found, _ = measured(capsys, [*SMALL, "--op", "all", "--vocab", "40"])
    assert {row["op"] for row in found["rows"] if row["forward"]} == set(MAKERS)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--bench", "--heads", "3", "--kv-heads", "2"], "--kv-heads 2: --heads 3 is no multiple of it"),
        (["--bench", "--seq-len", "0"], "--seq-len 0: it is at least 1"),
        (["--bench", "--head-dim", "7"], "--head-dim 7: it is even"),
        (["--bench", "--documents", "9", "--seq-len", "8"], "--documents 9: a row of --seq-len 8 has no room"),
        (["--bench", "--op", "adamw"], "--op adamw: has no benchmark; allowed: all, attention"),
        (["--bench", "--rounds", "0"], "--rounds 0: it is at least 1"),
        (["--bench", "--lse"], "--lse belongs to the table"),
        (["--seq-len", "8"], "--seq-len belongs to --bench"),
        (["--json"], "--json belongs to --bench"),
        (["--train.seq_len", "8"], "need -c FILE"),
        (["-c", "nowhere.yaml"], r"nowhere\.yaml"),
    ],
)
def test_what_cannot_be_is_refused(words, message):
    with pytest.raises(UserError, match=message):
        main([*words, "--device", "cpu"])


def test_an_implementation_that_is_wrong_or_too_large_shows(monkeypatch):
    @register("attention", "halved", speed=9)
    def halved(q, k, v, *, mask, **options):
        return 0.5 * torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    @register("attention", "hungry", speed=8)
    def hungry(q, k, v, *, mask, **options):
        if q.shape[2] > kernels_bench.ERROR_TOKENS:
            raise torch.OutOfMemoryError("no more")
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    @register("attention", "broken", speed=7)
    def broken(q, k, v, *, mask, **options):
        raise RuntimeError("no kernel image\nfor this device")

    monkeypatch.setattr(kernels_bench, "ERROR_TOKENS", 16)
    monkeypatch.setattr(kernels_bench.psutil, "virtual_memory", lambda: type("Memory", (), {"available": 2**10})())
    try:
        from llmtrain.device import select

        shape = Shape(seq_len=32, heads=2, head_dim=8).complete()
        rows = {row.name: row for row in bench(["attention"], shape, Call("cpu", torch.float32), device=select("cpu"), rounds=1)}
    finally:
        for name in ("halved", "hungry", "broken"):
            unregister("attention", name)
    assert 0.4 < rows["halved"].error < 0.6 and rows["halved"].state == "chosen"
    assert (rows["hungry"].state, rows["hungry"].why, rows["hungry"].forward) == ("failed", "out of memory", None)
    assert rows["hungry"].error < 1e-6
    assert (rows["broken"].state, rows["broken"].why, rows["broken"].error) == ("failed", "no kernel image", None)
    assert rows["sdpa"].forward > 0
    assert rows["reference"].state == "refused" and "GiB of scores" in rows["reference"].why


def test_the_pairs_of_a_shape_are_those_of_its_mask():
    from llmtrain.ops.attention import visible

    for documents in (1, 2, 5):
        for window in (0, 1, 4, 99):
            shape = Shape(batch=2, seq_len=17, documents=documents, window=window)
            mask = shape.mask()
            seen = visible(mask, rows=2, queries=range(17), keys=range(17), device=torch.device("cpu")).expand(2, -1, -1, -1)
            assert shape.pairs() == int(seen.sum())
    assert Shape(seq_len=10, documents=10).mask() == Mask(documents=((1,) * 10,))
