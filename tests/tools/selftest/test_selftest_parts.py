"""Pieces of the self-test: processes that crash, redaction, verdicts, meshes by number of ranks."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from llmtrain.tools.selftest import parity, work
from llmtrain.tools.selftest.kernels_run import difference
from llmtrain.tools.selftest.redact import clean, redacted
from llmtrain.tools.selftest.work import Job, Result


def test_a_crash_costs_its_own_job_alone(tmp_path):
    jobs = [
        Job("matmul", "matmul", {"size": 16, "format": "fp32"}),
        Job("impossible", "matmul", {"size": -1, "format": "fp32"}),
        Job("memory", "memory", {"mebibytes": 1}),
    ]
    seen = []
    results = work.run(
        jobs, ranks=1, device="cpu", folder=tmp_path, plugins=[], done=lambda job, result: seen.append((job.name, result.error))
    )
    assert [name for name, _ in seen] == ["matmul", "impossible", "memory"] == list(results)
    assert results["matmul"].values["flops"] > 0 and results["memory"].values["seconds"] > 0
    assert "Error" in results["impossible"].error and "-1" in results["impossible"].error


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6, 8, 16])
@pytest.mark.parametrize("device", ["cpu", "npu"])
def test_every_row_runs_or_says_why(ranks, device):
    rows = parity.rows(ranks, device)
    assert len({row.name for row in rows}) == len(rows)
    refused = {row.name: parity.refusal(row, ranks=ranks, device=device) for row in rows}
    assert all(reason is None for reason in refused.values()), refused
    axes = {axis for row in rows for axis in row.parallel}
    assert {"dp_shard", "dp_replicate", "tp", "pp", "cp", "ep"} <= axes if ranks > 1 else not axes
    assert ("one rank" in {row.name for row in rows}) == (device != "cpu")


def result(folder: Path, name: str, losses: list[float], gradient: list[float]) -> Result:
    path = folder / f"{name}.npz"
    np.savez(path, weight=np.array(gradient))
    return Result({"losses": losses}, path)


def results(folder: Path, ours: Result) -> dict[str, Result]:
    found = {"tp 2, fp32": ours, "reference dense fp32": result(folder, "alone", [2.0, 1.0], [3.0, 4.0])}
    for index, name in enumerate(["order", *(f"nudge {n}" for n in parity.NUDGES)]):
        found[f"reference dense fp32 {name}"] = result(folder, name, [2.0, 1.0 + index * 1e-7], [3.0, 4.0 + index * 1e-6])
    return found


@pytest.mark.parametrize(
    ("losses", "gradient", "state"),
    [
        ([2.0, 1.0 + 1e-6], [3.0, 4.0], "passed"),
        ([2.0, 1.0 + 2e-6], [3.0, 4.0], "failed"),
        ([2.0, 1.0], [3.0, 4.0 + 2e-5], "failed"),
        ([math.nan, 1.0], [3.0, 4.0], "failed"),
        ([2.0, 1.0], [3.0, math.nan], "failed"),
    ],
)
def test_verdicts(tmp_path, losses, gradient, state):
    row = parity.Row({"tp": 2})
    line = parity.verdict(row, "fp32", results(tmp_path, result(tmp_path, "ours", losses, gradient)))
    assert line["state"] == state, line
    assert line["loss_bound"] == pytest.approx(5 * 3e-7) and line["gradient_bound"] == pytest.approx(5 * 3e-6 / 5)


def test_a_run_that_failed_is_a_failed_line(tmp_path):
    line = parity.verdict(parity.Row({"tp": 2}), "fp32", results(tmp_path, Result(error="RuntimeError: no")))
    assert line["state"] == "failed" and line["error"] == "RuntimeError: no"


def test_differences():
    right = torch.tensor([3.0, -4.0, -math.inf])
    assert difference(right.clone(), right) == 0
    assert difference(torch.tensor([3.0, -4.1, -math.inf]), right) == pytest.approx(0.1 / 5, rel=1e-5)
    assert difference(torch.tensor([3.0, math.nan, -math.inf]), right) == math.inf
    assert difference(torch.tensor([3.0, -4.0, 0.0]), right) == math.inf


def test_names_are_hidden(monkeypatch):
    monkeypatch.setattr("socket.gethostname", lambda: "gpu07.cluster.example")
    monkeypatch.setattr("socket.getfqdn", lambda: "gpu07.cluster.example")
    monkeypatch.setattr("getpass.getuser", lambda: "alice")
    monkeypatch.setattr("pathlib.Path.home", lambda: Path("/home/alice"))
    said = "on gpu07.cluster.example (gpu07, 10.1.2.33, aa:bb:cc:dd:ee:ff) /home/alice/x by alice at 127.0.0.1, malice, torch 2.13.0"
    hidden = "on <host> (<host>, <address>, <address>) <home>/x by <user> at 127.0.0.1, malice, torch 2.13.0"
    assert clean(said) == hidden
    assert redacted({"gpu07": [said, 3, None, (True,)]}) == {"<host>": [hidden, 3, None, [True]]}
