"""`llmtrain train` on two local ranks: what a run leaves, the same losses however it is started, killed, stopped and resumed."""

import json
import os
import re
import shutil
import signal
import subprocess
from itertools import pairwise
from pathlib import Path

import psutil
import pytest

pytestmark = pytest.mark.xdist_group("two-ranks")
EXTRAS = ("--checkpoint.export", "hf", "--metrics.tensorboard", "--metrics.bigram_baseline", "--metrics.sample", "ROMEO")


@pytest.fixture(scope="session")
def straight(lab):
    """The uninterrupted run that the others are compared with."""
    return lab.train("straight", *EXTRAS, "--metrics.sample_tokens", "12", config="two.yaml")


def close(left: list[float], right: list[float], tolerance: float) -> bool:
    assert len(left) == len(right)
    worst = max(abs(a - b) / abs(b) for a, b in zip(left, right))
    print(f"largest relative difference {worst:.1e}")
    return worst < tolerance


def test_what_a_run_leaves(straight):
    names = {path.name for path in straight.path.iterdir()}
    assert {"config.yaml", "env.json", "metrics.jsonl", "checkpoints", "latest", "log", "tb", "hf", "report.md"} <= names
    assert os.path.realpath(straight.path / "latest").endswith("step-00000040")
    assert {path.name for path in (straight.path / "log").iterdir()} == {"rank-0.txt", "rank-1.txt"}
    assert json.loads((straight.path / "env.json").read_text())["ranks"] == 2
    assert list((straight.path / "tb").glob("events.out.tfevents*"))
    assert {"config.json", "model.safetensors", "tokenizer.model"} <= {path.name for path in (straight.path / "hf").iterdir()}
    assert straight.checkpoints() == [f"step-{step:08d}" for step in range(5, 41, 5)]


def test_what_a_run_prints(straight):
    expected = (
        r"^device: cpu .*\ncores: .*1 thread each.*\nmesh: dp_shard 2 \(gloo\), engine native$",
        r"^kernels: .*attention tiled.*\ncompile: off \(.*$",
        r"^measured at initialisation: c_attention 0\.\d+, c_ffn 0\.\d+$",
        r"^step +1/40  ETA \d\d:\d\d  loss 6\.\d+  grad .* lr 1\.00e-03 .*tok/s",
        r"^step 40/40  ETA 00:00  loss",
        r"^step 10: validation loss \d\.\d{4} on plays-validation \(8 sequences of 64 tokens\)$",
        r"^saved .*step-00000005 in \d",
        r"^validation loss on plays-validation: \d\.\d{4} nats/token$",
        r"^an interpolated bigram model of the same tokens: \d\.\d{4} nats/token$",
        r"^a passage by the model:\n\nROMEO",
        r"^run folder: runs/straight$",
        r"^report: +runs/straight/report.md$",
        r"^weights: +runs/straight/hf$",
    )
    missing = [pattern for pattern in expected if not re.search(pattern, straight.out, re.MULTILINE)]
    assert not missing, straight.out
    assert straight.err == ""


def test_the_loss_falls_and_validation_is_recorded(straight):
    losses = straight.losses()
    assert len(losses) == 40 and 6.3 < losses[0] < 6.8  # ln 600 = 6.40
    assert sum(losses[-5:]) / 5 < losses[0] - 0.5
    validation = [(line["step"], line["source"]) for line in straight.lines("validation")]
    assert validation == [(step, "plays-validation") for step in (10, 20, 30, 40)]
    assert straight.lines("validation")[-1]["loss"] < straight.lines("validation")[0]["loss"]


def test_steps_are_where_the_plan_puts_them(straight):
    found = straight.values("samples", "tokens", "lr")
    assert [found[s][0] for s in (1, 2, 40)] == [[0, 8], [8, 8], [312, 8]]
    assert [found[s][1] for s in (1, 40)] == [512, 20480]
    assert [round(found[s][2], 9) for s in (1, 2, 3)] == [0.001, 0.002, 0.003]
    assert 3e-4 < found[40][2] < 3.2e-4, "cosine ends at a tenth of the peak"


def test_the_report_and_the_export_hold_what_the_run_said(straight):
    report = (straight.path / "report.md").read_text()
    final = re.search(r"validation loss on plays-validation: (\S+)", straight.out).group(1)
    bigram = re.search(r"bigram model of the same tokens: (\S+)", straight.out).group(1)
    assert final in report and bigram in report and "ROMEO" in report
    from safetensors.numpy import load_file

    weights = load_file(straight.path / "hf" / "model.safetensors")
    assert sum(w.size for w in weights.values()) == sum(w.size for w in weights.values() if abs(w).max() < 1e3) > 50_000


def test_torchrun_gives_the_same_bits(lab, straight):
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0")
    run = lab.train("torchrun", config="two.yaml", launcher=launcher)
    assert run.values() == straight.values()


def test_one_rank_gives_the_same_losses(lab, straight):
    one = lab.train("one", "--parallel.dp_shard", "1", config="two.yaml")
    assert "mesh: one rank" in one.out
    assert close(one.losses(), straight.losses(), 1e-5)
    assert close([v["loss"] for v in one.lines("validation")], [v["loss"] for v in straight.lines("validation")], 1e-5)


COUNT_AT_EXIT = """
import atexit, os
from pathlib import Path


def count():
    names = [Path(f"/proc/self/task/{task}/comm").read_text() for task in os.listdir("/proc/self/task")]
    Path(os.environ["COUNTS"], os.environ["RANK"]).write_text(str(sum("gloo" in name for name in names)))


"RANK" in os.environ and atexit.register(count)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="threads are counted in /proc")
def test_no_thread_of_gloo_is_left_when_python_ends(lab, tmp_path):
    """One that lets go of a tensor while Python ends kills the process: exit code 134 after a run that had done all its work."""
    (tmp_path / "sitecustomize.py").write_text(COUNT_AT_EXIT)
    env = {"COUNTS": str(tmp_path), "PYTHONPATH": os.pathsep.join([str(tmp_path), lab.env["PYTHONPATH"]])}
    lab.train("threads", "--train.steps", "2", config="two.yaml", env=env)
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["0", "0"]


# --- kills, signals -------------------------------------------------------------------------------------------------------------------


def kill_launcher(process: subprocess.Popen) -> None:
    process.kill()


def kill_rank_1(process: subprocess.Popen) -> None:
    [rank] = [child for child in psutil.Process(process.pid).children() if child.environ()["RANK"] == "1"]
    rank.kill()


def kill_all(process: subprocess.Popen) -> None:
    for child in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
        child.kill()


def terminate(process: subprocess.Popen) -> None:
    process.send_signal(signal.SIGTERM)


def ctrl_c(process: subprocess.Popen) -> None:
    process.send_signal(signal.SIGINT)


TRAIL = {
    "SIGTERM": (terminate, 7),  # the signals first: they take effect a moment later, which must not be after the last step
    "SIGINT": (ctrl_c, 14),
    "launcher killed": (kill_launcher, 20),
    "rank killed": (kill_rank_1, 26),
    "all killed": (kill_all, 32),
}


@pytest.fixture(scope="session")
def trail(lab, straight):
    """One run, ended in five ways and continued by the same command each time; name -> (run, its checkpoints and newest one then)."""
    ended = {}
    for name, (act, step) in TRAIL.items():
        run = lab.interrupt("trail", act, config="two.yaml", at=step)
        ended[name] = (run, run.checkpoints(), Path(os.path.realpath(run.path / "latest")).name, run.lines("train")[-1]["step"])
    ended["finished"] = (lab.train("trail", config="two.yaml"), None, None, 40)
    return ended


def test_every_loss_is_that_of_the_uninterrupted_run(trail, straight):
    run = trail["finished"][0]
    assert run.values() == straight.values()
    assert [line["step"] for line in run.lines("validation")] == [10, 20, 30, 40]
    assert [v["loss"] for v in run.lines("validation")] == [v["loss"] for v in straight.lines("validation")]


@pytest.mark.parametrize(("name", "code"), [("launcher killed", -signal.SIGKILL), ("rank killed", 137), ("all killed", -signal.SIGKILL)])
def test_a_kill_is_survived_and_said(trail, name, code):
    run, _, _, _ = trail[name]
    assert run.code == code
    if name == "rank killed":
        assert "rank 1" in run.err


def test_each_start_resumes_from_the_newest_complete_checkpoint(trail):
    names = [*TRAIL, "finished"]
    assert "resumed" not in trail[names[0]][0].out
    for before, name in pairwise(names):
        run, (_, checkpoints, _, _) = trail[name][0], trail[before]
        whole = [int(c.split("-")[1]) for c in checkpoints if "." not in c]
        step = run.resumed()
        assert step == max(whole), (name, checkpoints)
        tokens = f"{step * 512 / 1e6:.2f}M tokens"
        assert f"resumed from step {step}: {tokens}, next sample {8 * step} (runs/trail/checkpoints/step-{step:08d})" in run.out


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_saves_the_current_step_and_ends_with_2(trail, name):
    run, checkpoints, latest, step = trail[name]
    assert run.code == 2
    assert latest == checkpoints[-1] == f"step-{step:08d}"
    assert f"stopped by SIGTERM after step {step}; the same command goes on from here" in run.out  # the launcher forwards as SIGTERM
    assert "Traceback" not in run.err


def test_another_world_size_goes_on_at_the_exact_sample(lab, straight):
    lab.copy(straight, "worlds", newest=20)
    one = lab.train("worlds", "--parallel.dp_shard", "1", config="two.yaml")
    assert "resumed from step 20: 0.01M tokens, next sample 160" in one.out
    assert one.values("samples", "tokens", "lr", "targets") == straight.values("samples", "tokens", "lr", "targets")
    losses = one.losses()
    assert losses[:20] == straight.losses()[:20]
    assert close(losses, straight.losses(), 1e-5)
    for step in (35, 40):
        shutil.rmtree(one.path / "checkpoints" / f"step-{step:08d}")
    two = lab.train("worlds", config="two.yaml")
    assert two.resumed() == 30 and "next sample 240" in two.out
    assert two.losses()[:30] == losses[:30]
    assert close(two.losses(), straight.losses(), 1e-5)


# --- damage ---------------------------------------------------------------------------------------------------------------------------


def flip(checkpoint: Path) -> None:
    file = max(checkpoint.glob("*.distcp"), key=lambda path: path.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def test_a_damaged_checkpoint_is_named_and_the_one_before_used(lab, straight):
    path = lab.copy(straight, "damaged", newest=40)
    flip(path / "checkpoints" / "step-00000040")
    run = lab.train("damaged", config="two.yaml")
    assert re.search(r"step-00000040 is damaged \(\S+\.distcp: sha256 .*\); trying the one before", run.out)
    assert run.resumed() == 35
    assert run.values() == straight.values()


def test_a_run_whose_checkpoints_all_are_damaged_does_not_start_over(lab, straight):
    path = lab.copy(straight, "hopeless", newest=10)
    before = (path / "metrics.jsonl").read_bytes()
    for name in ("step-00000005", "step-00000010"):
        flip(path / "checkpoints" / name)
    run = lab.train("hopeless", "--parallel.dp_shard", "1", config="two.yaml", code=1)
    assert run.err.count("\n") == 1 and "every checkpoint in runs/hopeless/checkpoints is damaged" in run.err
    assert "checkpoint.resume: none" in run.err
    assert (path / "metrics.jsonl").read_bytes() == before
    assert run.checkpoints() == ["step-00000005", "step-00000010"]


def test_a_finished_run_started_again_only_reports(lab, straight):
    lab.copy(straight, "again", newest=40)
    before = straight.values()
    run = lab.train("again", "--parallel.dp_shard", "1", config="two.yaml")
    assert run.resumed() == 40 and run.values() == before
