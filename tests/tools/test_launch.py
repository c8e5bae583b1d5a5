"""The local launcher, run as a user would: a launcher process with small scripts as its ranks."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from llmtrain.tools import launch

ROOT = Path(__file__).parents[2]
LAUNCHER = """
import signal, sys
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # both are ignored under nohup and in a script's background jobs
signal.signal(signal.SIGINT, signal.default_int_handler)
from llmtrain.tools.launch import run_local
code = run_local(sys.argv[4:], int(sys.argv[2]), grace=float(sys.argv[3]), command=[sys.executable, sys.argv[1]])
assert "torch" not in sys.modules
sys.exit(code)
"""


@pytest.fixture
def start(tmp_path):
    """Start a launcher whose ranks run `script`; they see the folder as argument 1. Kills what is left at the end."""
    started = []

    def go(script: str, *, ranks: int = 2, grace: float = 20.0) -> subprocess.Popen:
        target = tmp_path / f"target-{len(started)}.py"
        target.write_text("import os, signal, sys, time\nfolder, rank = sys.argv[1], int(os.environ['RANK'])\n" + script)
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        env.pop("RANK", None)
        command = [sys.executable, "-c", LAUNCHER, str(target), str(ranks), str(grace), str(tmp_path)]
        started.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        return started[-1]

    yield go
    for process in started:
        for left in [*_children(process.pid), process]:
            left.kill()
        process.communicate()


def _children(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _wait_for(*paths: Path, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not all(path.exists() and path.stat().st_size for path in paths):
        assert time.monotonic() < end, f"waited {seconds} s for {paths}"
        time.sleep(0.02)


READY = "open(f'{folder}/ready-{rank}', 'w').write(str(os.getpid()))\n"
SAVE_ON_TERM = "signal.signal(signal.SIGTERM, lambda *a: (open(f'{folder}/saved-{rank}', 'a').write('x'), sys.exit(2)))\n"
SLEEP = "time.sleep(60)\n"


def test_every_rank_sees_its_place(start, tmp_path):
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")
    run = start(f"open(f'{{folder}}/env-{{rank}}', 'w').write(' '.join(os.environ[n] for n in {names}))\nprint('from', rank)", ranks=3)
    out, err = run.communicate(timeout=30)
    assert run.returncode == 0 and err == "" and out == "from 0\n"
    seen = [(tmp_path / f"env-{rank}").read_text().split() for rank in range(3)]
    assert [s[:5] for s in seen] == [[str(r), str(r), "3", "3", "127.0.0.1"] for r in range(3)]
    assert len({tuple(s[5:]) for s in seen}) == 1 and int(seen[0][6]) >= 1


@pytest.mark.parametrize("code", [0, 1, 2, 3, 7])
def test_exit_code_of_ranks_that_agree(start, code):
    run = start(f"sys.stderr.write('train.steps: wrong\\n')\nsys.exit({code})")
    _, err = run.communicate(timeout=30)
    assert run.returncode == code
    assert err == "train.steps: wrong\n", "an error that all ranks have is printed once"


def test_one_failing_rank_brings_down_the_others(start, tmp_path):
    run = start("if rank == 1:\n    print('before')\n    raise KeyError('broken here')\n" + SAVE_ON_TERM + SLEEP)
    began = time.monotonic()
    _, err = run.communicate(timeout=30)
    assert time.monotonic() - began < 10
    assert run.returncode == 1
    assert "rank 1 ended with exit code 1" in err and "KeyError: 'broken here'" in err and "before" in err
    assert (tmp_path / "saved-0").exists() and not (tmp_path / "saved-1").exists()


def test_the_cause_is_shown_when_rank_0_only_saw_its_peer_vanish(start):
    run = start("if rank == 1:\n    raise KeyError('the cause')\ntime.sleep(0.5)\nraise ConnectionError('peer is gone')\n")
    _, err = run.communicate(timeout=30)
    assert run.returncode == 1 and "the cause" in err and "peer is gone" in err


def test_a_rank_that_ignores_sigterm_is_killed(start, monkeypatch):
    run = start("if rank == 1:\n    sys.exit(5)\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + SLEEP)
    began = time.monotonic()
    run.communicate(timeout=30)
    assert run.returncode == 5 and time.monotonic() - began < launch.FAIL_PATIENCE + launch.KILL_PATIENCE + 5


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_are_forwarded_once_and_ranks_save(start, tmp_path, signum):
    run = start(SAVE_ON_TERM + READY + SLEEP)
    _wait_for(tmp_path / "ready-0", tmp_path / "ready-1")
    run.send_signal(signum)
    assert run.wait(timeout=20) == 2
    assert [(tmp_path / f"saved-{rank}").read_text() for rank in (0, 1)] == ["x", "x"]


def test_ctrl_c_at_the_terminal_reaches_ranks_only_through_the_launcher(start, tmp_path):
    count = "signal.signal(signal.SIGINT, lambda *a: open(f'{folder}/int-{rank}', 'w'))\n"
    run = start(count + SAVE_ON_TERM + READY + SLEEP)
    _wait_for(tmp_path / "ready-0", tmp_path / "ready-1")
    groups = {os.getpgid(run.pid)} | {os.getpgid(int((tmp_path / f"ready-{r}").read_text())) for r in (0, 1)}
    assert len(groups) == 3, "a rank in the launcher's process group would get the terminal's SIGINT too"


def test_second_ctrl_c_ends_a_run_that_will_not_stop(start, tmp_path):
    abort = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nsignal.signal(signal.SIGINT, lambda *a: os._exit(130))\n"
    run = start(abort + READY + SLEEP)
    _wait_for(tmp_path / "ready-0", tmp_path / "ready-1")
    run.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert run.poll() is None
    run.send_signal(signal.SIGINT)
    assert run.wait(timeout=10) == 130


def test_ranks_that_do_not_stop_are_killed_after_the_grace(start, tmp_path):
    run = start("signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + READY + SLEEP, grace=1.0)
    _wait_for(tmp_path / "ready-0", tmp_path / "ready-1")
    run.send_signal(signal.SIGTERM)
    _, err = run.communicate(timeout=20)
    assert run.returncode == 137 and "killed" in err


def test_killing_the_launcher_leaves_no_rank(start, tmp_path):
    run = start("signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + READY + SLEEP, ranks=3)
    ready = [tmp_path / f"ready-{rank}" for rank in range(3)]
    _wait_for(*ready)
    time.sleep(0.2)
    ranks = [psutil.Process(int(path.read_text())) for path in ready]
    run.kill()
    _, alive = psutil.wait_procs(ranks, timeout=10)
    assert not alive


def test_a_rank_killed_from_outside(start, tmp_path):
    run = start(SAVE_ON_TERM + READY + SLEEP)
    _wait_for(tmp_path / "ready-0", tmp_path / "ready-1")
    os.kill(int((tmp_path / "ready-1").read_text()), signal.SIGKILL)
    _, err = run.communicate(timeout=20)
    assert run.returncode == 137 and "rank 1" in err


def test_what_a_rank_started_ends_with_it(start, tmp_path):
    child = "import subprocess\nchild = subprocess.Popen(['sleep', '60'])\nopen(f'{folder}/child-{rank}', 'w').write(str(child.pid))\n"
    run = start(child + "os._exit(4)")
    run.communicate(timeout=20)
    assert run.returncode == 4
    time.sleep(0.2)
    left = [int((tmp_path / f"child-{rank}").read_text()) for rank in (0, 1)]
    assert not [pid for pid in left if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE]


def test_the_port_is_held_and_still_usable():
    import socket

    with launch.reserved_port() as port, launch.reserved_port() as other:
        assert port != other
        with socket.socket(socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET) as store:
            store.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            store.bind(("", port))
            store.listen()
            with socket.create_connection(("127.0.0.1", port), timeout=5):
                pass


def test_two_launches_at_once_do_not_meet(start):
    script = """
import torch, torch.distributed as dist
torch.set_num_threads(1)
dist.init_process_group("gloo")
value = torch.tensor([float(os.environ["MASTER_PORT"])])
dist.all_reduce(value)
assert value.item() == 2 * float(os.environ["MASTER_PORT"])
dist.destroy_process_group()
"""
    runs = [start(script), start(script)]
    for run in runs:
        _, err = run.communicate(timeout=60)
        assert run.returncode == 0, err


def test_user_threads_are_kept(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert launch._rank_env(0, 2, port=1, threads=None)["OMP_NUM_THREADS"] == "3"
    assert launch._rank_env(0, 2, port=1, threads=5)["OMP_NUM_THREADS"] == "5"
    monkeypatch.delenv("OMP_NUM_THREADS")
    cores = len(os.sched_getaffinity(0))
    assert launch._rank_env(0, 2, port=1, threads=None)["OMP_NUM_THREADS"] == str(max(1, cores // 2))


def test_no_ranks_is_an_error():
    with pytest.raises(ValueError, match="at least 1"):
        launch.run_local([], 0)
