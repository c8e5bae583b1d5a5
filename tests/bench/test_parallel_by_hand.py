"""bench/parallel.py: the engine calls the collectives of a script written by hand, and what differs is found."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHAPE = {"vocab": 64, "dim": 32, "layers": 2, "heads": 2, "ffn": 64, "seq": 16}
sys.path.insert(0, str(ROOT / "bench"))


def bench(out: Path, *arguments: str) -> subprocess.CompletedProcess:
    words = [word for name, value in SHAPE.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, str(ROOT / "bench/parallel.py"), "--rounds", "0", "--out", str(out), *words, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)


def test_collectives_and_losses_are_those_of_the_scripts(tmp_path):
    done = bench(tmp_path / "result.md", "--only", "dp2,tp2,pp2,cp2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("the same") == 4
    rows = [
        line.split("|")
        for line in (tmp_path / "result.md").read_text().splitlines()
        if line.startswith(("| dp2", "| tp2", "| pp2", "| cp2"))
    ]
    found = {row[1].strip(): [int(count) for count in row[3].split("/")] for row in rows}
    layers = SHAPE["layers"]
    sharded = 2 * (layers + 2) + layers - 1  # blocks and both ends gathered and reduced; all blocks but the last gathered again
    expected = {"dp2": sharded + 2, "tp2": 2 + 3 + 10 * layers + 1 + 1, "pp2": 2 * 4 + 1, "cp2": sharded + 2 * layers + 1}
    assert found == {mesh: [count] * 2 for mesh, count in expected.items()}


@pytest.mark.parametrize("option", [("--only", "dp3"), ("--rounds", "-1"), ("--batch", "3")])
def test_wrong_options_are_refused(option, monkeypatch):
    import parallel

    monkeypatch.setattr(sys, "argv", ["parallel.py", *option])
    with pytest.raises(SystemExit, match=option[0]):
        parallel.arguments()


def test_what_differs_is_found():
    from mesh_worlds.recorder import Collective, comparable

    gathered = Collective("all_gather", (0, 1), 64, 0)
    summed = Collective("all_reduce", (0, 1), 8, 3)
    assert comparable([gathered, summed]) != comparable([summed, gathered])
    assert comparable([gathered]) != comparable([gathered._replace(bytes=65)])
    assert comparable([gathered]) != comparable([gathered._replace(ranks=(0, 2))])
    sent, received = Collective("send", (0, 1), 4, 5), Collective("recv", (0, 1), 4, 5)
    assert comparable([sent, received]) == comparable([received, sent])
    later = sent._replace(moment=6)
    assert comparable([received, later]) != comparable([later, received._replace(moment=7)])
