"""The build files of docker/: linted, with versions of Makefile and setup.py, and copying what exists. No image is built here."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "docker").glob("Dockerfile.*"))


def instructions(path: Path) -> list[tuple[str, str]]:
    """(instruction, its words) with continued lines joined and comments left out."""
    text = re.sub(r"^\s*#.*\n", "", path.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [(line.split()[0], line.split(None, 1)[1]) for line in text.splitlines() if line.strip()]


def arguments(path: Path) -> dict[str, str]:
    return dict(words.split("=", 1) for name, words in instructions(path) if name == "ARG")


def test_there_are_three():
    assert [path.suffix for path in FILES] == [".ascend", ".cpu", ".cuda"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_hadolint(path):
    tool = Path(sys.executable).with_name("hadolint")
    if not tool.exists():
        pytest.skip("hadolint has no package for this system")
    done = subprocess.run([str(tool), str(path)], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "", done.stdout


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_versions_are_those_of_the_makefile(path):
    makefile = (ROOT / "Makefile").read_text()
    torch = re.search(r"^TORCH \?= (\S+)", makefile, re.MULTILINE)[1]
    given = arguments(path)
    assert given["TORCH"] == torch and given["TORCH_INDEX"] in makefile
    if path.suffix == ".ascend":
        assert given["TORCH_NPU"].split("==")[1] == torch.split("==")[1]
    minor = re.search(r"py(?:thon:)?(3\.\d+)", path.read_text())[1]
    assert tuple(map(int, minor.split("."))) >= (3, 10)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_pinned_bases_sources_and_user(path):
    steps = instructions(path)
    base = next(words for name, words in steps if name == "FROM").replace("${CANN}", arguments(path).get("CANN", ""))
    assert re.search(r":\d+\.\d+", base) and "latest" not in base
    sources = [word for name, words in steps if name == "COPY" for word in words.split()[:-1] if not word.startswith("--")]
    assert sources and all((ROOT / source).exists() for source in sources)
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert set(sources) <= allowed
    users = [words for name, words in steps if name == "USER"]
    assert users[-1] == "1000", "runAsNonRoot of Kubernetes wants a number that is not 0"
    torch = next(index for index, (name, words) in enumerate(steps) if name == "RUN" and "$TORCH" in words)
    code = next(index for index, (name, words) in enumerate(steps) if name == "COPY" and words.startswith("llmtrain "))
    dependencies = next(index for index, (name, words) in enumerate(steps) if name == "COPY" and words.startswith("setup.py"))
    assert torch < dependencies < code, "what changes least comes first"


def test_the_code_that_is_copied_installs(tmp_path):
    """What the images do with the sources, up to the dependencies: a wheel with all packages and the files they read."""
    import zipfile

    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    for name in allowed:
        source, target = ROOT / name, tmp_path / "context" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__")) if source.is_dir() else shutil.copy(source, target)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet", "-w", str(tmp_path), "."]
    done = subprocess.run(command, cwd=tmp_path / "context", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    names = set(zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist())
    wanted = {str(p.relative_to(ROOT)) for p in (ROOT / "llmtrain").rglob("*.py")} | {"llmtrain_kernels/mask.py"}
    assert wanted <= names, wanted - names
    assert {str(p.relative_to(ROOT)) for p in (ROOT / "llmtrain").rglob("*.yaml")} <= names


def test_the_entry_point_runs_what_it_is_given():
    script = ROOT / "docker" / "ascend-entrypoint.sh"
    done = subprocess.run(["bash", str(script), "echo", "a b", "$HOME"], capture_output=True, text=True)
    assert done.stdout == "a b $HOME\n" and done.returncode == 0
    assert subprocess.run([str(Path(sys.executable).with_name("shellcheck")), str(script)]).returncode == 0
