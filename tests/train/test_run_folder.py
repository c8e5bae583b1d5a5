"""The run folder: its files, its lock, cutting the metrics back, logging per rank."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llmtrain.config.load import load
from llmtrain.config.run import RunConfig
from llmtrain.errors import UserError
from llmtrain.train import run_folder
from llmtrain.train.run_folder import RunFolder, setup_logging

HOLD = "import sys; from llmtrain.config.run import RunConfig; from llmtrain.train.run_folder import RunFolder\n"
HOLD += "folder = RunFolder.create(RunConfig(output=sys.argv[1])); print('open', flush=True); sys.stdin.read()"


def config(tmp_path: Path, **values) -> RunConfig:
    return RunConfig(output=str(tmp_path), name="one", **values)


def test_create_writes_config_and_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_API_KEY", "hunter2")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.setattr(sys, "argv", ["llmtrain", "train", "--hub-token", "hunter2", "--api_key=hunter2", "--train.steps", "3"])
    with RunFolder.create(config(tmp_path, seed=7)) as folder:
        assert folder.path == tmp_path / "one" and folder.checkpoints.is_dir() and folder.log.is_dir()
    assert load(folder.path / "config.yaml", []).run == config(tmp_path, seed=7)
    text = (folder.path / "env.json").read_text()
    env = json.loads(text)
    assert "hunter2" not in text
    assert env["command"] == "llmtrain train --hub-token '***' '--api_key=***' --train.steps 3"
    assert env["versions"]["torch"] and env["host"] and env["started"] and env["device"].startswith(("cpu", "cuda", "npu"))
    assert env["variables"]["OMP_NUM_THREADS"] == "2"


def test_an_earlier_config_is_kept_only_if_it_differs(tmp_path):
    for seed in (1, 1, 2, 3):
        RunFolder.create(config(tmp_path, seed=seed)).close()
    assert sorted(p.name for p in (tmp_path / "one").glob("config*")) == ["config.1.yaml", "config.2.yaml", "config.yaml"]
    seeds = [load(tmp_path / "one" / name, []).run.seed for name in ("config.1.yaml", "config.2.yaml", "config.yaml")]
    assert seeds == [1, 2, 3]


def test_a_second_run_is_refused_until_the_first_is_gone(tmp_path):
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "open\n"
        before = (tmp_path / "run" / "env.json").read_text()
        with pytest.raises(UserError, match=rf"in use by process {holder.pid} on .*`--name`"):
            RunFolder.create(RunConfig(output=str(tmp_path)))
        assert (tmp_path / "run" / "env.json").read_text() == before
        holder.kill()
    RunFolder.create(RunConfig(output=str(tmp_path))).close()


def test_a_folder_that_cannot_be_made_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written.*`output`"):
        RunFolder.create(RunConfig(output=str(tmp_path / "file")))


def lines(*steps: int) -> str:
    return "".join(json.dumps({"kind": "train", "step": step}) + "\n" for step in steps)


@pytest.mark.parametrize("tail", ["", '{"kind": "tra', '{"kind": "train", "step": 3}', "\x00\x00\x00"])
def test_truncate_metrics(tmp_path, tail):
    folder = RunFolder(tmp_path)
    assert folder.truncate_metrics(0) == 0
    folder.metrics.write_text(lines(1, 2, 2, 3, 4) + tail)
    with open(folder.metrics, "a") as already_open:
        assert folder.truncate_metrics(2) == 2 + bool(tail)
        already_open.write(lines(3))
    assert folder.metrics.read_text() == lines(1, 2, 2, 3)


def test_truncate_metrics_keeps_everything_up_to_the_step(tmp_path):
    folder = RunFolder(tmp_path)
    folder.metrics.write_text(lines(1, 2))
    assert folder.truncate_metrics(2) == 0 and folder.metrics.read_text() == lines(1, 2)
    assert folder.truncate_metrics(0) == 2 and folder.metrics.read_text() == ""


def test_logging_goes_to_the_ranks_file_and_only_warnings_of_rank_0_to_the_console(tmp_path, capsys):
    root = logging.getLogger()
    before = (root.level, list(root.handlers))
    try:
        for rank in (0, 1):
            setup_logging(tmp_path, rank)
            logging.getLogger("x").info("quiet %d", rank)
            logging.getLogger("x").warning("loud %d", rank)
    finally:
        logging.captureWarnings(False)
        for handler in [h for h in root.handlers if h not in before[1]]:
            root.removeHandler(handler)
            handler.close()
        root.setLevel(before[0])
    for rank in (0, 1):
        text = (tmp_path / "log" / f"rank-{rank}.txt").read_text()
        assert f"INFO x: quiet {rank}" in text and f"WARNING x: loud {rank}" in text and f"{1 - rank}\n" not in text
    assert capsys.readouterr().err == "WARNING x: loud 0\n"


def test_no_commit_outside_a_checkout(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "__file__", str(tmp_path / "a" / "b" / "c.py"))
    assert run_folder._commit() is None
