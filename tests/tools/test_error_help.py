"""A known error is explained once, after what was there already: by the command line and by the launcher."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from llmtrain.hardware.messages import HEADING

ROOT = Path(__file__).parents[2]
VERB = """
import sys, types
from llmtrain import cli
probe = types.ModuleType("probe_verb")
def main(argv):
    {body}
probe.main = main
sys.modules["probe_verb"] = probe
cli.VERBS["probe"] = cli.Verb("probe_verb", "")
sys.exit(cli.main(["probe"]))
"""
LAUNCHER = """
import sys
from llmtrain.tools.launch import run_local
sys.exit(run_local([], 2, command=[sys.executable, sys.argv[1]]))
"""
EI0006 = "EI0006: [PID: 1292363] 2025-04-08-18:07:20.444.436 Getting socket times out. Reason: Remote Rank did not send the data in time."


def python(*words):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    env.pop("RANK", None)
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=600, env=env)


def raises(text, kind="RuntimeError"):
    return python("-c", VERB.format(body=f"raise {kind}({text!r})"))


def test_the_command_line_explains_after_the_traceback():
    done = raises(EI0006)
    assert done.returncode == 1 and done.stderr.count(HEADING) == 1
    places = [done.stderr.index(words) for words in ("Traceback", EI0006, HEADING, "HCCL_CONNECT_TIMEOUT=600")]
    assert places == sorted(places)


@pytest.mark.parametrize("text", ["index 507015 is out of range", "the step failed"])
def test_the_command_line_leaves_other_errors_alone(text):
    done = raises(text)
    assert done.returncode == 1 and done.stderr.rstrip().endswith(f"RuntimeError: {text}")


def test_an_error_that_is_caught_is_not_explained():
    body = f"""
    import llmtrain.cli as c
    error = RuntimeError({EI0006!r})
    c._explain_after(error)
    raise ValueError("another one")"""
    done = python("-c", VERB.format(body=body.strip()))
    assert "another one" in done.stderr and HEADING not in done.stderr


@pytest.fixture
def launch(tmp_path):
    def go(rank_0, rank_1):
        script = tmp_path / "ranks.py"
        script.write_text(
            "import os, sys, time\n"
            f"if os.environ['RANK'] == '0':\n    {rank_0}\n    sys.exit(0)\n"
            f"sys.stderr.write({rank_1!r} + chr(10))\nsys.stderr.flush()\nos.abort()\n"
        )
        return python("-c", LAUNCHER, str(script))

    return go


def test_the_launcher_explains_the_last_lines_of_a_rank_that_failed(launch):
    done = launch("pass", EI0006)
    assert f"[rank 1] {EI0006}" in done.stderr and done.stderr.count(HEADING) == 1
    assert done.stderr.index(EI0006) < done.stderr.index(HEADING)


def test_the_launcher_does_not_say_it_twice(launch):
    done = launch("pass", f"{EI0006}\n{HEADING} (EI0006): said by the rank")
    assert done.stderr.count(HEADING) == 1


def test_the_launcher_leaves_other_errors_alone(launch):
    assert HEADING not in launch("pass", "ValueError: 507015").stderr
