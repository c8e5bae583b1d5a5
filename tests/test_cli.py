"""The command line: speed, exit codes, one-line errors."""

import ast
import importlib.util
import os
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

from llmtrain import cli
from llmtrain.errors import UserError

ROOT = Path(__file__).parents[1]


def python(*words, **env):
    return subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, timeout=600, env={**os.environ, "PYTHONPATH": str(ROOT), **env}
    )


def test_help_imports_neither_torch_nor_pydantic():
    code = (
        "import sys; from llmtrain.cli import main; main(['--help']); "
        "print(sorted({'torch', 'pydantic', 'yaml', 'numpy'} & set(sys.modules)))"
    )
    assert python("-c", code).stdout.splitlines()[-1] == "[]"


def test_help_takes_under_half_a_second():
    def seconds():
        start = time.perf_counter()
        done = python("-m", "llmtrain", "--help")
        assert done.returncode == 0 and "train" in done.stdout
        return time.perf_counter() - start

    assert min(seconds() for _ in range(3)) < 0.5


@pytest.mark.parametrize("name", cli.VERBS)
def test_every_listed_verb_exists(name):
    verb = cli.VERBS[name]
    spec = importlib.util.find_spec(verb.module)
    assert spec is not None, f"{verb.module} does not exist; do not list {name}"
    functions = {node.name for node in ast.parse(Path(spec.origin).read_text()).body if isinstance(node, ast.FunctionDef)}
    assert verb.function in functions


@pytest.fixture
def verb(monkeypatch):
    """Install a verb `probe` that runs a function."""

    def install(function):
        module = types.ModuleType("probe_verb")
        module.main = function
        monkeypatch.setitem(sys.modules, "probe_verb", module)
        monkeypatch.setitem(cli.VERBS, "probe", cli.Verb("probe_verb", "probe"))
        monkeypatch.delenv("LLMTRAIN_TRACEBACK", raising=False)

    return install


def raises(error):
    def function(argv):
        raise error

    return function


@pytest.mark.parametrize("code", [0, 2, 3])
def test_exit_codes_of_a_verb_pass_through(verb, code):
    verb(lambda argv: code)
    assert cli.main(["probe"]) == code


@pytest.mark.parametrize("error", [UserError("set a.b"), FileNotFoundError(2, "No such file or directory", "x.txt")])
def test_user_errors_are_one_line(verb, error, capsys, monkeypatch):
    verb(raises(error))
    assert cli.main(["probe"]) == 1
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and ("set a.b" in err or "x.txt" in err)
    monkeypatch.setenv("LLMTRAIN_TRACEBACK", "1")
    with pytest.raises(type(error)):
        cli.main(["probe"])


def test_data_errors_are_user_errors(verb, capsys):
    from llmtrain.data.errors import DataError

    verb(raises(DataError("bad.bin: truncated")))
    assert cli.main(["probe"]) == 1
    assert capsys.readouterr().err == "llmtrain: bad.bin: truncated\n"


def test_other_errors_keep_their_traceback(verb):
    verb(raises(RuntimeError("a bug")))
    with pytest.raises(RuntimeError):
        cli.main(["probe"])


@pytest.mark.parametrize(("stop", "code"), [(SystemExit(2), 1), (SystemExit(0), 0), (SystemExit("words"), 1), (SystemExit(None), 0)])
def test_argparse_does_not_mean_stopped_after_saving(verb, stop, code):
    verb(raises(stop))
    assert cli.main(["probe"]) == code


def test_ctrl_c(verb):
    verb(raises(KeyboardInterrupt()))
    assert cli.main(["probe"]) == 130


def test_unknown_verb(capsys):
    assert cli.main(["trian"]) == 1
    assert "did you mean train?" in capsys.readouterr().err


def test_wrong_configuration_from_the_shell():
    done = python("-m", "llmtrain", "config", "show", "--train.stepz", "3")
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr == "llmtrain: train.stepz: no such option (command line); did you mean train.steps?\n"


def test_a_closed_pipe_is_no_error():
    shell = f"{sys.executable} -m llmtrain config schema | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert (done.returncode, done.stderr) == (0, "")


def test_the_package_is_light_and_has_its_names():
    code = (
        "import sys, llmtrain; assert 'pydantic' not in sys.modules; assert callable(llmtrain.run); "
        "print(llmtrain.__version__, llmtrain.RunConfig.__name__)"
    )
    assert python("-c", code).stdout == "0.1.0 RunConfig\n"
