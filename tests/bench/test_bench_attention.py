"""bench/attention.py: its arithmetic, on the CPU with tiny shapes."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llmtrain.ops import Mask
from llmtrain.ops.sdpa import attention_sdpa

PATH = Path(__file__).resolve().parents[2] / "bench/attention.py"
SPEC = importlib.util.spec_from_file_location("bench_attention", PATH)
bench = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(bench)
SIZES = {"hidden": 32, "tokens": 64}


def right(q, k, v, causal):
    return attention_sdpa(q, k, v, mask=Mask(causal=causal))


def wrong(q, k, v, causal):
    return attention_sdpa(q, k, v, mask=Mask(causal=not causal))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_writes_nothing(tmp_path):
    out = tmp_path / "page.md"
    run = subprocess.run([sys.executable, PATH, "--out", out], capture_output=True, text=True)
    assert run.returncode == 1 and "needs a CUDA GPU" in run.stderr and not out.exists()


def test_flop_of_a_case():
    full, causal = bench.Case(16, False, 32), bench.Case(16, True, 32)
    q = full.tensors("cpu", **SIZES)[0]
    assert q.shape == (2, 2, 32, 16)
    assert full.flop(q) == 2 * 2 * (2 * 32 * 32 * 16 + 2 * 32 * 32 * 16) == 2 * causal.flop(q)


def test_rows_are_rates_of_medians():
    case = bench.Case(128, True, 2048)
    line = bench.row(case, 10**12, {"fast": [0.01, 0.05], "sdpa flash": [0.02, 0.04], "sdpa cuDNN": [0.04, 0.1]})
    assert line == "| 128 | causal | 2,048 | 100.0 / 50.0 | 50.0 / 62.5 | 25.0 / 25.0 | 2.00 / 0.80 |"
    assert bench.row(case, 10**12, {"fast": [0.01, 0.05]}) == "| 128 | causal | 2,048 | 100.0 / 50.0 | - | - | - |"


def test_contenders_take_turns_and_the_first_rounds_do_not_count():
    called, ticks = [], iter(range(100, 0, -1))
    contenders = {name: lambda *x, name=name: (called.append(name), right(*x))[1] for name in ("a", "b")}

    def clock(call):
        call()
        return next(ticks)

    case = bench.Case(16, True, 8)
    medians = bench.measure(contenders, case, case.tensors("cpu", **SIZES, dtype=torch.float32), rounds=3, clock=clock)
    assert called == ["a", "b", "b", "a"] * 2 + ["a", "b"]
    assert medians == {"a": [86, 85], "b": [88, 87]}
    assert bench.cpu_clock(lambda: None) >= 0


def test_what_computes_something_else_is_named_and_not_timed(monkeypatch):
    def absent(*_):
        raise RuntimeError("no kernel\nmore")

    monkeypatch.setattr(bench, "CONTENDERS", {"right": right, "wrong": wrong, "absent": absent})
    monkeypatch.setattr(bench, "CHECKED", 32)
    good, said = bench.served("cpu", [16], **SIZES)
    assert list(good) == ["right"]
    assert "not timed" in said[1] and said[2] == "absent left out: no kernel"
