"""The example plugin in real processes: by `plugins:`, as an installed entry point, on two ranks; and sources that break the contract."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from llmtrain.config.data import Source
from llmtrain.data.errors import DataError
from llmtrain.data.packing import Sample
from llmtrain.data.sources import CheckedSource

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "plugin"


def llmtrain(place: Path, *words: str, path: tuple[Path, ...] = (), code: int = 0) -> tuple[str, str]:
    """(stdout, stderr) of `llmtrain WORDS` in `place`, which must end with `code`."""
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, (ROOT, *path))), "PYTHONWARNINGS": "ignore"}
    command = ["-c", "from llmtrain.cli import main; raise SystemExit(main())", *words]
    # As the installed script does: the working folder is not on the path by itself.
    done = subprocess.run([sys.executable, "-P", *command] if sys.version_info >= (3, 11) else [sys.executable, *command],
                          cwd=place, env=env, capture_output=True, text=True, timeout=600, stdin=subprocess.DEVNULL)  # fmt: skip
    assert done.returncode == code, f"{done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout, done.stderr


def losses(place: Path, name: str) -> list[float]:
    lines = map(json.loads, (place / "runs" / name / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if line["kind"] == "train"]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("plugin")
    for name in ("llmtrain_example.py", "run.yaml"):
        shutil.copy(EXAMPLE / name, place)
    llmtrain(place, "train", "-c", "run.yaml", "--precision", "fp64")
    return place


def test_it_is_short():
    code = (EXAMPLE / "llmtrain_example.py").read_text().split('"""\n', 1)[1]
    lines = [line for line in code.splitlines() if line.strip() and not line.startswith(("import", "from")) and '"""' not in line]
    assert len(lines) <= 36


def test_two_ranks_and_one_have_the_same_losses(place):
    llmtrain(place, "train", "-c", "run.yaml", "--precision", "fp64", "--parallel.dp_shard", "1", "--name", "one")
    two, one = losses(place, "plugin"), losses(place, "one")
    assert len(two) == 20 and two[-1] < two[0] - 0.3
    assert max(abs(a - b) / b for a, b in zip(two, one, strict=True)) < 1e-10


def test_every_part_is_really_used(place):
    for name, change in {"scale": ("--model.parallel.scale", "1.0"), "family": ("--model.family", "transformer")}.items():
        words = ("train", "-c", "run.yaml", "--precision", "fp64", "--train.steps", "2", "--parallel.dp_shard", "1", "--name", name)
        out, _ = llmtrain(place, *words, *change)
        assert abs(losses(place, name)[1] - losses(place, "plugin")[1]) > 1e-6, name
        assert "swiglu sigmoid" in out


def test_it_resumes_at_the_exact_sample(place):
    words = ("train", "-c", "run.yaml", "--precision", "fp64", "--name", "resumed", "--parallel.dp_shard", "1")
    shutil.copytree(place / "runs/plugin", place / "runs/resumed", symlinks=True)
    shutil.rmtree(place / "runs/resumed/checkpoints/step-00000020")
    out, _ = llmtrain(place, *words)
    assert "resumed from step 10" in out
    assert max(abs(a - b) / b for a, b in zip(losses(place, "resumed"), losses(place, "plugin"), strict=True)) < 1e-10


def test_the_stage_is_a_verb_with_options(place):
    llmtrain(place, "unlearn", "-c", "run.yaml", "--name", "un", "--train.steps", "6")  # two ranks: the started ones know the verb too
    objective = losses(place, "un")  # -0.5 x cross-entropy, which falls as the cross-entropy rises
    assert objective[0] == pytest.approx(-0.5 * losses(place, "plugin")[0], rel=1e-5) and objective[-1] < objective[0]
    assert "unlearn: checked" in llmtrain(place, "unlearn", "-c", "run.yaml", "--dry-run")[0]
    out, _ = llmtrain(place, "unlearn", "-c", "run.yaml", "-h")
    assert "away from the text" in out and "--unlearn.weight" in out and "--model.parallel.scale" in out


WRONG = [
    (("train", "--model.parallel.scal", "1"), "model.parallel.scal: no such option (command line); did you mean model.parallel.scale?"),
    (("train", "--unlearn.weight", "much"), "unlearn.weight: 'much' is not allowed (command line); allowed: a number"),
    (("train", "--data.train.0.file", "x"), "data.train.0.file: no such option (command line); did you mean data.train.0.files?"),
    (
        ("train", "--data.train.0.kind", "byte"),
        "data.train.0.kind: 'byte' is not allowed (command line); allowed: one of tokens, conversations, bytes; did",
    ),
    (("train", "--model.family", "paralel"), "model.family: 'paralel' is not registered; allowed: parallel, transformer; did you mean par"),
    (("unlern",), "did you mean unlearn?"),
    (("train", "--model.vocab_size", "90"), "data.train.0: sample "),
]
ASK = """
import contextlib, io, json, sys
from llmtrain.cli import main
answers = []
for verb, *words in json.loads(sys.argv[1]):
    with contextlib.redirect_stderr(io.StringIO()) as err:
        answers.append((main([verb, "-c", "run.yaml", *words]), err.getvalue()))
print(json.dumps(answers))
"""


def test_what_is_wrong_is_said_in_one_line(place):
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-c", ASK, json.dumps([words for words, _ in WRONG])]
    done = subprocess.run(command, cwd=place, env=env, capture_output=True, text=True, timeout=600, check=True)
    for (words, message), (code, err) in zip(WRONG, json.loads(done.stdout.splitlines()[-1]), strict=True):
        assert code == 1 and err.count("\n") == 1 and message in err, (words, err)


@pytest.fixture
def installed(tmp_path) -> Path:
    """A folder of installed packages with the example in it, as pip leaves it."""
    shutil.copy(EXAMPLE / "llmtrain_example.py", tmp_path)
    info = tmp_path / "llmtrain_example-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: llmtrain-example\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[llmtrain.plugins]\nexample = llmtrain_example\n")
    return tmp_path


def test_an_installed_plugin_needs_no_mention(place, installed, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    text = (EXAMPLE / "run.yaml").read_text().replace("plugins: [llmtrain_example]\n", "").replace('"*.py"', f'"{EXAMPLE}/*.py"')
    (elsewhere / "run.yaml").write_text(text)
    _, err = llmtrain(elsewhere, "train", "-c", "run.yaml", code=1)
    assert "no such option" in err
    llmtrain(elsewhere, "train", "-c", "run.yaml", "--precision", "fp64", "--train.steps", "2", path=(installed,))
    assert losses(elsewhere, "plugin")[0] == pytest.approx(losses(place, "plugin")[0], rel=1e-12)
    assert "unlearn: checked" in llmtrain(elsewhere, "unlearn", "-c", "run.yaml", "--dry-run", path=(installed,))[0]
    out, _ = llmtrain(elsewhere, "--help", path=(installed,))
    assert "unlearn" not in out  # nothing is loaded for it


def test_a_run_without_the_plugin_is_read_without_it(place, installed, tmp_path):
    llmtrain(tmp_path, "config", "show", "--train.steps", "1", path=(installed,))
    script = "import sys; from llmtrain import RunConfig; from llmtrain.config.load import to_yaml; print(to_yaml(RunConfig.load()))"
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(installed)])}
    text = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=600, check=True).stdout
    assert "parallel:" in text and "unlearn" not in text and "scale: 1.0" not in text


class Mine(Source):
    kind: str = "mine"


class Samples:
    """A source that gives `answer(index, calls so far)`."""

    def __init__(self, answer, samples_per_epoch=100):
        self.answer, self.samples_per_epoch, self.calls = answer, samples_per_epoch, 0

    def sample(self, index):
        self.calls += 1
        return self.answer(index, self.calls)


def given(tokens=None, borders=()):
    tokens = np.arange(9) if tokens is None else tokens
    return lambda index, calls: Sample(tokens, np.array(borders, np.int64))


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (Samples(lambda index, calls: np.arange(9) + calls), "is not the same when asked for again"),
        (Samples(given(np.arange(8))), r"is int64 of shape \(8,\); it must be 9 integers"),
        (Samples(given(np.zeros(9))), "is float64"),
        (Samples(given(np.full(9, -1))), "has the token id -1"),
        (Samples(given(borders=(0, 3))), "has the borders"),
        (Samples(given(borders=(3, 3))), "has the borders"),
        (Samples(given(borders=(9,))), "has the borders"),
        (Samples(given(), samples_per_epoch=0), "samples_per_epoch is 0"),
        (object(), "samples_per_epoch is None"),
    ],
)
def test_a_source_that_breaks_the_contract_is_refused(samples, message):
    with pytest.raises(DataError, match=rf"source of kind 'mine' .*{message}"):
        CheckedSource(Mine(), samples, seq_len=8)


def test_a_good_source_passes_as_it_is():
    checked = CheckedSource(Mine(), Samples(given(np.arange(9, dtype=np.uint8), (2, 8))), seq_len=8)
    assert checked.sample(250).tokens.dtype == np.int64 and checked.sample(250).borders.tolist() == [2, 8]


@pytest.mark.parametrize(
    ("number", "message"),
    [
        ("int(os.environ.get('RANK', 0))", "give other samples on rank 1 than on rank 0"),
        ("os.getpid() % 251", "give another first sample than when this run began"),
    ],
)
def test_samples_that_depend_on_the_process_are_refused(tmp_path, number, message):
    source = f"""
    import os
    import numpy as np
    from typing import Literal
    from llmtrain.config.data import Source
    from llmtrain.data.sources import register_source

    class Mine(Source):
        kind: Literal["mine"] = "mine"

    @register_source(Mine)
    class Samples:
        samples_per_epoch = 100
        def __init__(self, source, *, seq_len, **_):
            self.seq_len = seq_len
        def sample(self, index):
            return np.full(self.seq_len + 1, {number})
    """
    (tmp_path / "mine.py").write_text(textwrap.dedent(source))
    text = (EXAMPLE / "run.yaml").read_text().replace("[llmtrain_example]", "[mine]").split("kernels:")[0]
    text = text.replace("  family: parallel\n  parallel: {scale: 0.5}\n", "") + "data: {train: [{kind: mine}]}\n"
    (tmp_path / "run.yaml").write_text(text + "train: {steps: 4, seq_len: 64, global_batch: 2}\ncheckpoint: {every: 2}\n")
    if "RANK" in number:
        _, err = llmtrain(tmp_path, "train", "-c", "run.yaml", "--parallel.dp_shard", "2", code=1)
    else:
        llmtrain(tmp_path, "train", "-c", "run.yaml", "--train.steps", "2")  # the first run cannot know
        _, err = llmtrain(tmp_path, "train", "-c", "run.yaml", code=1)
    assert "sources of kind mine" in err and message in err
