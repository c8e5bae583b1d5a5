"""The command, run for real: on this machine, and where torch does not load."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llmtrain.tools.doctor import smoke
from llmtrain.tools.doctor.machine import Verdict

ROOT = Path(__file__).parents[3]


def doctor(*words, cwd, env=None):
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **(env or {})}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        variables.pop(name, None)
    command = [sys.executable, "-c", "import sys; sys.path.pop(0); from llmtrain.cli import main; code = main(sys.argv[1:]); "
               "print('parent-has-torch' if 'torch' in sys.modules else ''); sys.exit(code)", "doctor", *words]  # fmt: skip
    done = subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True, timeout=600)
    assert "parent-has-torch" not in done.stdout, "the parent has imported torch"
    return done


def lines_of(path):
    return {(line["group"], line["name"]): line for line in json.loads(path.read_text())["lines"]}


def test_this_machine_and_two_ranks(tmp_path):
    done = doctor("--device", "cpu", "--ranks", "2", "--json", "report.json", cwd=tmp_path)
    lines = lines_of(tmp_path / "report.json")
    test = lines["collectives", "gloo, 2 ranks"]
    assert test["verdict"] == "OK" and all(name in test["text"] for name in ("all_reduce", "all_to_all", "send_recv")), done.stdout
    assert lines["torch", "import"]["verdict"] == "OK" and ("ascend", "devices") not in lines
    assert lines["clock", "files in this folder"]["verdict"] == "OK"
    wrong = [line for line in lines.values() if line["verdict"] == "WRONG"]
    assert done.returncode == (1 if wrong else 0)


def test_a_torch_that_does_not_load(tmp_path):
    fake = tmp_path / "site/torch"
    fake.mkdir(parents=True)
    (fake / "__init__.py").write_text("raise ImportError('libc10.so: cannot open shared object file')")
    env = {"PYTHONPATH": f"{tmp_path / 'site'}{os.pathsep}{ROOT}"}
    done = doctor("--device", "cpu", "--json", "report.json", cwd=tmp_path, env=env)
    lines = lines_of(tmp_path / "report.json")
    assert done.returncode == 1 and "libc10.so" in lines["torch", "import"]["text"]
    assert lines["packages", "torch"]["verdict"] == "WRONG" and "hides the installed package" in lines["packages", "torch"]["text"]


def test_a_torch_that_crashes(tmp_path):
    fake = tmp_path / "site/torch"
    fake.mkdir(parents=True)
    (fake / "__init__.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    env = {"PYTHONPATH": f"{tmp_path / 'site'}{os.pathsep}{ROOT}"}
    done = doctor("--device", "cpu", "--json", "report.json", cwd=tmp_path, env=env)
    assert done.returncode == 1 and "SIGSEGV" in lines_of(tmp_path / "report.json")["torch", "import"]["text"]


def test_a_device_that_is_not_here(tmp_path):
    if list(Path("/dev").glob("davinci[0-9]*")):
        pytest.skip("this machine has NPUs")
    done = doctor("--device", "npu", "--ranks", "0", cwd=tmp_path)
    assert done.returncode == 1 and "no /dev/davinci* here" in done.stdout and "do:" in done.stdout


def test_under_torchrun_the_ranks_test_together(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "llmtrain"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    words = ["doctor", "--device", "cpu", "--json", "report.json"]
    done = subprocess.run([*command, *words], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=600)
    assert lines_of(tmp_path / "report.json")["collectives", "gloo, 2 ranks"]["verdict"] == "OK", done.stdout + done.stderr
    assert done.stdout.count("docs/doctor.md explains") == 1 and done.returncode == 0


TWO_NODES = """
import os, socket, sys, time
rank, true = int(os.environ["RANK"]), time.time
socket.gethostname = lambda: f"node{rank}"
os.environ["LOCAL_RANK"] = "0"
time.time = lambda: true() + 100 * rank
sys.argv = ["smoke_rank", sys.argv[1], "cpu", "60", sys.argv[1] + "lines"]
from llmtrain.tools.doctor import smoke_rank
smoke_rank.main()
"""


def test_clocks_and_findings_of_two_nodes(tmp_path):
    (tmp_path / "node.py").write_text(TWO_NODES)
    line = {"group": "ascend", "name": "CANN", "verdict": "WRONG", "text": "not found", "fix": "install it"}
    (tmp_path / "lines").write_text(json.dumps([line]))
    code = (
        "import sys; from llmtrain.tools.launch import run_local; "
        "sys.exit(run_local(sys.argv[2:], 2, command=[sys.executable, sys.argv[1]]))"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    env.pop("RANK", None)
    command = [sys.executable, "-c", code, str(tmp_path / "node.py"), f"{tmp_path}/"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    results = [json.loads((tmp_path / str(rank)).read_text()) for rank in range(2)]
    (host, (ahead, within)), *more = results[0]["clocks"].items()
    assert (host, more) == ("node1", []) and abs(ahead - 100) <= within + 0.01
    outcome = smoke.judge("cpu", 2, results, "")
    assert [found.name for found in outcome.lines if found.verdict is Verdict.WRONG] == ["of node1"]
    assert outcome.others == {"node1": [line]}
