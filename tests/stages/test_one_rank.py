"""`llmtrain train` in one process: phases, guards, number formats, recomputation, full disks, wrong words."""

import json
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest

from llmtrain.config.load import load
from llmtrain.layout.steps import StepPlan

pytestmark = pytest.mark.xdist_group("one-rank")

# --- phases ---------------------------------------------------------------------------------------------------------------------------

PHASES = """
extends: base.yaml
data:
  train: [{path: plays-train, name: plays, weight: 1}, {path: plays-validation, name: spare, weight: 1}]
train:
  steps: null
  phases:
    - {name: short, steps: 6, seq_len: 64, batch: [{from_tokens: 0, size: 4}, {from_tokens: 700, size: 8}], mix: {plays: 1, spare: 0}}
    - name: long
      tokens: 25000
      seq_len: 128
      batch: 4
      micro_batch: 4
      rope_base: 500000.0
      schedule: {kind: constant, lr: 1.0e-3, warmup_steps: 2}
      mix: {plays: 1, spare: 3}
checkpoint: {every: 4}
"""


@pytest.fixture(scope="session")
def phased(lab):
    (lab.folder / "phases.yaml").write_text(PHASES)
    return lab.train("phased", config="phases.yaml")


def test_phases_give_the_steps_that_were_asked_for(phased):
    found = phased.values("phase", "samples", "tokens", "lr", "targets")
    assert [found[s][1] for s in range(1, 9)] == [[0, 4], [4, 4], [8, 4], [12, 8], [20, 8], [28, 8], [36, 4], [40, 4]]
    assert [found[s][2] for s in (1, 3, 4, 6, 7, 8)] == [256, 768, 1280, 2304, 2816, 3328]
    assert [found[s][0] for s in (6, 7)] == ["short", "long"]
    assert len(found) == 6 + 49, "25000 tokens of 4 x 128 are 49 steps"
    assert [found[s][3] for s in (7, 8, 9, 55)] == [0.0005, 0.001, 0.001, 0.001]
    assert found[7][4] > 400, "most of 4 x 128 tokens have a target"
    assert "long: 49 steps of sequences of 128 tokens, 0.0M tokens, RoPE base 500000, peak lr 0.001" in phased.out


def test_phases_are_those_of_the_step_plan(lab, phased):
    plan = StepPlan.from_config(load(lab.folder / "phases.yaml", []).run)
    steps = [plan.step(index) for index in range(plan.steps)]
    expected = {s.index + 1: (s.phase.name, [s.first_sample, s.batch], s.tokens_before + s.batch * s.seq_len, s.lr) for s in steps}
    assert phased.values("phase", "samples", "tokens", "lr") == expected


def test_a_kill_in_the_second_phase_changes_no_bit(lab, phased):
    argv = ("train", "-c", "phases.yaml", "--name", "phased-killed")
    path = lab.folder / "runs" / "phased-killed"
    process = lab.start(*argv)
    while not ((path / "checkpoints" / "step-00000012").exists() and lab.reached(path, 14)):
        assert process.poll() is None, process.communicate()
    process.kill()
    process.communicate(timeout=60)
    run = lab.train("phased-killed", config="phases.yaml")
    assert 12 <= run.resumed() < 55
    assert run.values() == phased.values()


@pytest.mark.parametrize("option", ["train.phases.1.rope_base", "train.phases.1.mix"])
def test_what_a_phase_changes_matters(lab, phased, option):
    """From the last checkpoint of phase 1 on: the first step of phase 2 differs when the option does."""
    name = f"phased-{option.split('.')[-1]}"
    path = lab.copy(phased, name, newest=4)
    other = {"train.phases.1.rope_base": "100", "train.phases.1.mix": "{plays: 1, spare: 0}"}[option]
    run = lab.train(name, f"--{option}", other, config="phases.yaml")
    changed, before = run.values(), phased.values()
    assert [changed[s] for s in range(1, 7)] == [before[s] for s in range(1, 7)]
    assert changed[7] != before[7] and (path / "config.1.yaml").exists()


# --- guards ---------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def poisoned(lab):
    """Arguments and environment of a run with the plugin; call c of a rank is layer c % 2 of its micro-batch c // 2."""
    shutil.copy(Path(__file__).with_name("poison.py"), lab.folder / "poison_plugin.py")
    return ("--plugins", "[poison_plugin]", "--kernels.swiglu", "poison")


def test_nan_stops_the_run_with_3_and_names_its_samples(lab, poisoned):
    # Rank 1 of 2 runs micro-batches (1, 3) of step s: calls 4 s to 4 s + 3. Its second of step index 6 holds samples 48 + 6 and 7.
    env = {"POISON": f"{4 * 6 + 3}=nan", "POISON_RANK": "1"}
    run = lab.train("nan", *poisoned, "--parallel.dp_shard", "2", env=env, code=3)
    assert "stopped by a guard: step 7: loss is nan" in run.out
    assert run.out.rstrip().splitlines()[-1].endswith("from samples 54, 55")
    assert "Traceback" not in run.out + run.err
    assert run.checkpoints() == ["step-00000005"] and len(run.losses()) == 6
    healthy = lab.train("nan", *poisoned)
    assert healthy.resumed() == 5 and len(healthy.losses()) == 40 and np.isfinite(healthy.losses()).all()


def test_experts_that_are_used_less_evenly_than_allowed_end_the_run_with_3(lab):
    experts = ("--model.ffn", "{kind: moe, experts: 4, top_k: 1, hidden: 32}", "--guards.experts", "{action: stop, entropy: 1.0, steps: 4}")
    run = lab.train("uneven", *experts, "--train.steps", "12", code=3)
    assert "stopped by a guard: step 4: experts of layers 0, 1 collapse: for 4 steps" in run.out and len(run.losses()) == 4
    assert re.search(r"step +1/12 .* load \d\S* +entropy 0\.9", run.out)
    assert lab.command("report", str(run.path))[0] == 0 and "## Experts" in (run.path / "report.md").read_text()


def test_spikes_and_nan_are_skipped_where_asked(lab, poisoned):
    env = {"POISON": ",".join([f"{8 * 6}=nan", *(f"{call}=-300" for call in range(8 * 20, 8 * 21))])}
    guards = ("--guards.non_finite", "skip", "--guards.spike", "{action: skip, window: 8}")
    run = lab.train("skips", *poisoned, *guards, "--model.norm.placement", "pre", env=env)  # a post norm would hide the factor
    skipped = {step for step, (skip, _) in run.values("skipped", "spike").items() if skip}
    assert {7, 21} <= skipped and run.values("spike")[21] == (1,)
    assert "step 7: loss is NaN" in run.events() or "step 7: loss is nan" in run.events()
    assert "from samples 48, 49" in run.events() and "spike: " in run.events()
    last = run.path / "checkpoints" / "step-00000040"
    assert applied_steps(last) == 40 - len(skipped), "a discarded step is no optimizer step"
    assert json.loads((last / "meta.json").read_text())["spikes"]["count"] == sum(s for (s,) in run.values("spike").values())


def applied_steps(checkpoint: Path) -> int:
    import torch
    import torch.distributed.checkpoint as dcp

    state = {"step": torch.tensor(0)}
    dcp.load(state, checkpoint_id=checkpoint, no_dist=True)
    return int(state["step"])


# --- number formats, recomputation ----------------------------------------------------------------------------------------------------

SHORT = ("--train.steps", "12", "--checkpoint.every", "0")


@pytest.fixture(scope="session")
def fp32(lab):
    return lab.train("fp32", *SHORT)


def difference(run, other) -> float:
    return max(abs(a - b) / b for a, b in zip(run.losses(), other.losses(), strict=True))


@pytest.mark.parametrize(("precision", "low", "high"), [("fp64", 1e-9, 1e-5), ("bf16", 1e-6, 2e-2)])
def test_a_format_is_used_and_close_to_fp32(lab, fp32, precision, low, high):
    run = lab.train(precision, *SHORT, "--precision", precision)
    assert low < difference(run, fp32) < high
    stored = sum(file.stat().st_size for file in (run.path / "checkpoints" / "step-00000012").glob("*.distcp"))
    single = sum(file.stat().st_size for file in (fp32.path / "checkpoints" / "step-00000012").glob("*.distcp"))
    assert (stored > 1.6 * single) is (precision == "fp64"), "bf16 computes in 16 bits and stores 32"


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_changes_nothing(lab, fp32, recompute):
    run = lab.train(recompute, *SHORT, "--train.recompute", recompute)
    assert difference(run, fp32) <= 1e-6


def test_deterministic_kernels_change_no_loss_on_the_cpu_and_other_groups_leave_hccls_buffer(lab, fp32):
    run = lab.train("deterministic", *SHORT, "--train.deterministic", "true", "--parallel.hccl_buffer_mb", "64")
    assert difference(run, fp32) <= 1e-6
    assert "parallel.hccl_buffer_mb: not used, groups are gloo's" in run.out


def test_fp16_resumes_its_loss_scale(lab, fp32):
    options = ("--precision", "{compute: fp16, loss_scale: {init: 1.0e9, growth_every: 4}}", "--train.steps", "30")
    run = lab.train("fp16", *options)
    skipped = [step for step, (skip,) in run.values("skipped").items() if skip]
    assert skipped and skipped[0] == 1 and "step discarded, loss scale halved" in run.events()
    assert all(abs(a - b) / b < 2e-2 for a, b in list(zip(run.losses(), fp32.losses()))[:1])
    lab.copy(run, "fp16-again", newest=15)
    again = lab.train("fp16-again", *options)
    assert again.resumed() == 15 and again.values("loss", "grad_norm", "skipped") == run.values("loss", "grad_norm", "skipped")
    scales = [json.loads((r.path / "checkpoints" / "step-00000030" / "meta.json").read_text())["engine"] for r in (run, again)]
    assert scales[0] == scales[1] != {} and scales[0] != {"loss_scale": {"value": 1e9}}


# --- full disk ------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(lab):
    path = lab.folder / "small"
    path.mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=2600k", "tmpfs", str(path)]
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("a small tmpfs needs root and mount(8)")
    done = subprocess.run(mount, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"tmpfs cannot be mounted here: {done.stderr.strip()}")
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)


def test_a_full_disk_costs_checkpoints_and_nothing_else(lab, small_disk):
    filler = small_disk / "filler"
    filler.write_bytes(bytes(1_100_000))  # leaves room for one checkpoint and a bit
    (lab.folder / "runs").mkdir(exist_ok=True)
    name = "full-disk"
    (lab.folder / "runs" / name).symlink_to(small_disk)
    run = lab.train(name, code=1)
    assert "checkpoint of step 10 failed: No space left on device" in run.out
    assert "training goes on, earlier checkpoints are untouched" in run.out
    assert run.out.rstrip().splitlines()[-1].startswith("the last checkpoint could not be written: No space left on device")
    assert "Traceback" not in run.out + run.err
    assert len(run.losses()) == 40 and run.checkpoints() == ["step-00000005"]
    losses = run.values()
    filler.unlink()
    again = lab.train(name, "--checkpoint.keep_last", "1")
    assert again.resumed() == 5 and again.values() == losses


# --- wrong words ----------------------------------------------------------------------------------------------------------------------

WRONG = {
    "unknown key": (("--train.stepz", "3"), "train.stepz: no such option (command line); did you mean train.steps?"),
    "missing data": (("--data.train.0", "nowhere"), "data.train.0: nowhere.bin: no such file"),
    "truncated data": (("--data.train.0", "truncated"), "truncated.bin: truncated: 1000001 bytes"),
    "wrong vocabulary": (("--tokenizer.path", "null", "--model.vocab_size", "500"), "the vocabulary has 500 ids"),
    "vocabulary below the tokenizer's": (("--model.vocab_size", "500"), "model.vocab_size 500 is below the 600"),
    "broken tokenizer": (("--tokenizer.path", "broken.model"), "broken.model: not a sentencepiece model"),
    "batch that does not split": (("--train.global_batch", "6"), "a batch of 6 sequences does not split over 2 data-parallel ranks x"),
    "too few positions": (("--model.position.kind", "learned", "--model.max_seq_len", "32"), "exceed model.max_seq_len 32"),
    "axis that does not fit": (("--parallel.tp", "3"), "parallel.tp 3 does not divide model.attention.heads"),
    "pipeline that does not fit": (("--parallel.pp", "2", "--parallel.layers_per_stage", "[1, 5]"), "parallel.layers_per_stage"),
    "virtual stages without a pipeline": (("--parallel.virtual_stages", "2"), "needs a pipeline: set parallel.pp"),
    "tp_kind of cuda": (
        ("--parallel.tp", "2", "--parallel.tp_kind", "symm_mem"),
        "parallel.tp_kind symm_mem: symmetric memory",
    ),
    "experts that are not there": (("--parallel.ep", "2"), "model.ffn.kind dense has none"),
    "deadline": (("--guards.deadline", "2020-01-01T00:00:00"), "guards.deadline 2020-01-01T00:00:00"),
    "no length": (("--train.steps", "null"), "set train.steps, train.tokens, train.epochs or train.phases"),
    "mix of an unknown source": (("--train.steps", "null", "--train.phases", "[{steps: 2, mix: {paly: 1}}]"), "paly"),
    "kernel": (("--parallel.dp_shard", "1", "--kernels.attention", "flsh"), "kernels.attention=flsh: no such implementation"),
    "no such file": (("-c", "nothing.yaml"), "nothing.yaml"),
    "plugin": (("--plugins", "[not_there]"), "plugins: 'not_there' cannot be imported"),
}
SEEN_BY_RANKS = ("kernel",)


@pytest.fixture(scope="session")
def broken_files(lab):
    (lab.folder / "broken.model").write_text("garbage")
    shutil.copy(lab.folder / "plays-train.idx", lab.folder / "truncated.idx")
    (lab.folder / "truncated.bin").write_bytes((lab.folder / "plays-train.bin").read_bytes()[:1_000_001])


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_said_in_one_line(lab, broken_files, name):
    words, message = WRONG[name]
    config = () if words[0] == "-c" else ("-c", "base.yaml")
    run = f"wrong-{name.replace(' ', '-')}"
    code, out, err = lab.command("train", *config, "--name", run, "--parallel.dp_shard", "2", *words)
    assert code == 1
    own = err.splitlines()
    assert len(own) == 1 and own[0].startswith("llmtrain: ") and message in own[0], err
    if name not in SEEN_BY_RANKS:
        assert out == "" and not (lab.folder / "runs" / run).exists(), "no rank may have started"


def test_a_run_folder_in_use(lab):
    process = lab.start("train", "-c", "base.yaml", "--name", "busy", "--train.steps", "100000")
    while not lab.reached(lab.folder / "runs" / "busy", 2):
        assert process.poll() is None, process.communicate()
    code, out, err = lab.command("train", "-c", "base.yaml", "--name", "busy")
    assert process.poll() is None, "the first run goes on"
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 2
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert f"runs/busy is in use by process {process.pid}" in err and "--name" in err
