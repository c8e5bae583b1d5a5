"""Every command that README.md and the documentation show: it runs here, or at least it is one that would be understood."""

import os
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from documented import understand, words_of

from llmtrain.errors import UserError

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "examples").glob("*/README.md"))]
TINY = ["--train.steps", "3", "--model.layers", "1", "--model.hidden", "32", "--model.ffn.hidden", "48", "--train.seq_len", "32"]
TINY += ["--train.validate_samples", "4", "--metrics.sample_tokens", "4"]
SHORTER = {
    ("data", "tokenizer"): ["--vocab-size", "340"],
    ("data", "tokenize"): ["--validation", "0.2"],
    ("train",): TINY,
    ("generate",): ["--max-new", "4"],
    ("compare",): TINY,
    ("selftest",): ["--only", "doctor"],
}

pytestmark = pytest.mark.xdist_group("readme")


def blocks(page: Path, language: str = "bash") -> list[str]:
    """Commands of the fenced blocks, a line that ends in a backslash joined with the next, comments left out."""
    text = "\n".join(re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)).replace("\\\n", " ")
    return [line for line in (re.sub(r"(^|\s)#\s.*", "", line).strip() for line in text.splitlines()) if line]


def indented(page: Path) -> list[str]:
    """Lines of indented blocks that start with one of our commands."""
    lines = re.findall(r"^ {4,}((?:\.venv/bin/)?llmtrain .*|torchrun .*)$", page.read_text(), re.MULTILINE)
    return [re.sub(r"\s#\s.*", "", line).strip() for line in lines]


README = blocks(PAGES[0])


def elsewhere(command: str) -> bool:
    """Whether it wants hardware or machines that are not here."""
    return command.startswith("torchrun") or bool(re.search(r"llmtrain train .*--device (cuda|npu)", command))


@pytest.fixture(scope="session")
def place(tmp_path_factory) -> Path:
    """A folder that looks like a checkout to the commands: configs/, and a small corpus of one's own."""
    place = tmp_path_factory.mktemp("checkout")
    (place / "configs").symlink_to(ROOT / "configs")
    (place / "corpus").mkdir()
    lines = [f"In year {n} the king said {n * n} words to the queen, and {n % 7} more." for n in range(2000)]
    (place / "corpus" / "words.txt").write_text("\n".join(lines))
    rows = "".join(f'{{"text": "{" ".join(lines[n : n + 20])}"}}\n' for n in range(0, 2000, 20))
    (place / "corpus" / "words.jsonl").write_text(rows)
    return place


def llmtrain(place: Path, words: list[str]) -> subprocess.CompletedProcess:
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "llmtrain", *words]
    return subprocess.run(command, cwd=place, env=env, capture_output=True, text=True, timeout=600, stdin=subprocess.DEVNULL)


def shortened(words: list[str]) -> list[str]:
    if "--dry-run" in words:
        return words
    return words + next((more for verb, more in SHORTER.items() if tuple(words[: len(verb)]) == verb), [])


@cache
def recipe(target: str, *settings: str) -> list[str]:
    """What `make TARGET` would run."""
    command = ["make", "-n", "-B", "-C", str(ROOT), target, *settings]
    env = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKEOVERRIDES")}  # of the make that runs this
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.fixture(scope="session")
def quickstart(place) -> list[subprocess.CompletedProcess]:
    """The commands of `make quickstart`, shortened."""
    ours = [line.split("||")[-1].strip() for line in recipe("quickstart") if "/bin/llmtrain " in line]
    assert [words_of(line)[0] for line in ours] == ["data", "data", "train"]
    return [llmtrain(place, shortened(words_of(line))) for line in ours]


def test_make_quickstart(quickstart, place):
    assert [done.returncode for done in quickstart] == [0, 0, 0], quickstart[-1].stderr
    assert "mesh: dp_shard 2" in quickstart[-1].stdout and "runs/quickstart/report.md" in quickstart[-1].stdout
    assert (place / "runs" / "quickstart" / "hf" / "model.safetensors").exists()


def test_blocks_are_found():
    assert {"make quickstart", "make test"} <= set(README)
    assert sum(words_of(c) is not None for c in README) >= 11
    assert all(words_of(c) is not None or shlex.split(c)[0] == "make" for c in README), "a kind of command that no test covers"


def make_commands() -> list[str]:
    found = re.findall(r"^(make [a-z-]+)$|`(make [a-z-]+(?: [A-Z_]+=[^\s`]+)*)`", PAGES[0].read_text(), re.MULTILINE)
    return sorted({block or inline for block, inline in found})


@pytest.mark.parametrize("command", make_commands())
def test_make_targets(command):
    words = shlex.split(command)[1:]
    lines = recipe(*words)
    for setting in words[1:]:
        assert any(setting.split("=", 1)[1] in line for line in lines), f"{setting} changes nothing"


@pytest.mark.parametrize("command", [c for c in README if words_of(c) and not elsewhere(c)])
def test_a_readme_command_runs(command, place, quickstart):
    done = llmtrain(place, shortened(words_of(command)))
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert done.stdout.strip() and "Traceback" not in done.stderr


@pytest.mark.parametrize("command", [c for c in README if words_of(c) and elsewhere(c)])
def test_a_command_for_other_machines_is_understood(command, place, quickstart):
    verb, *words = words_of(command)
    assert verb == "train"
    done = llmtrain(place, ["config", "show", *words])
    assert done.returncode == 0, done.stderr
    from llmtrain.config.arguments import parse_run_arguments
    from llmtrain.layout.mesh import MeshShape
    from llmtrain.layout.steps import StepPlan

    cfg = parse_run_arguments([str(place / w) if w.endswith(".yaml") else w for w in words])[0].run
    world = MeshShape.from_config(cfg.parallel).world
    StepPlan.from_config(cfg).check_batches(dp=MeshShape.from_config(cfg.parallel).dp)
    if command.startswith("torchrun"):
        from torch.distributed.run import get_args_parser

        options = get_args_parser().parse_args(shlex.split(command)[1:])
        assert options.module and options.training_script == "llmtrain"
        assert int(options.nnodes) * int(options.nproc_per_node) == world


@pytest.mark.parametrize("device", ["cuda", "npu"])
def test_a_device_that_is_not_here(device, place, quickstart):
    import torch

    if torch.accelerator.is_available() and torch.accelerator.current_accelerator().type == device:
        pytest.skip(f"this machine has {device}")
    commands = [c for c in README if elsewhere(c) and f"--device {device}" in c]
    assert commands
    for command in commands:
        done = llmtrain(place, words_of(command))
        assert done.returncode == 1 and done.stdout == ""
        assert done.stderr.count("\n") == 1 and f"device: {device} cannot be used" in done.stderr, done.stderr


def page_commands() -> list[tuple[str, str]]:
    found = [(page.name, c) for page in PAGES[1:] for c in [*blocks(page), *blocks(page, "sh"), *indented(page)]]
    return [(name, c) for name, c in found if "llmtrain" in c and words_of(c)]


@pytest.mark.parametrize(("page", "command"), page_commands())
def test_a_documented_command_is_understood(page, command):
    understand(command)


@pytest.mark.parametrize(
    "command", ["doctor --rank 2 --no", "selftest --only", "compare -c configs/quickstart.yaml --a devise=cpu", "launch slurm -c x --nodez"]
)
def test_a_wrong_word_is_not_understood(command):
    with pytest.raises((SystemExit, UserError)):
        understand(f"llmtrain {command}")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_verb_and_linked_file_exists(page):
    from llmtrain.cli import VERBS

    text = page.read_text()
    verbs = set(re.findall(r"(?:^|[`/ ])llmtrain ([a-z]+)", "\n".join(re.findall(r"`[^`\n]+`|^ {4}.*$", text, re.MULTILINE))))
    assert verbs <= set(VERBS), verbs - set(VERBS)
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"[a-z]+:|#", link)]
    missing = [link for link in links if not (page.parent / link).exists()]
    assert not missing
