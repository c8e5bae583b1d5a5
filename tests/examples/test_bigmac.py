"""examples/bigmac: what is sent is a quarter, a wire carries it at its speed, and the tables say what was measured."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "bigmac"
sys.path[:0] = [str(EXAMPLE), str(EXAMPLE.parents[1] / "bench")]

import measure  # noqa: E402
import quality  # noqa: E402
import report  # noqa: E402
from job import BIGMAC, FINE, KINDS, TOP_K, Arm, Size, values  # noqa: E402
from wire import network  # noqa: E402
from wire.ranks import RankError, Ranks  # noqa: E402

from llmtrain.config.run import RunConfig  # noqa: E402
from llmtrain.layout.mesh import MeshShape  # noqa: E402
from llmtrain.layout.steps import StepPlan  # noqa: E402
from llmtrain.layout.traffic import traffic  # noqa: E402

SIZE = Size(layers=1, hidden=64, heads=2, experts=16, vocabulary=32, sequences=8, length=64)
TOKENS = SIZE.sequences * SIZE.length
WORKER = EXAMPLE / "worker.py"
NO_NETWORK = network.refuse()


def expected_rows(arm: Arm, tokens: int, *, passes: int) -> int:
    """Bytes over two ranks: half of the rows cross, there and back."""
    width = SIZE.hidden if arm.kind == FINE else SIZE.hidden // 4
    return 2 * passes * 2 * SIZE.layers * tokens * arm.top_k * width * 4 // 2


def test_bigmac_sends_exactly_a_quarter():
    with Ranks(2, None, worker=WORKER) as ranks:
        ranks.ask("build", size=list(SIZE))
        bench = measure.Bench(ranks, None, SIZE, say=print)
        for top_k in TOP_K:
            steps, runs = ({kind: of(Arm(kind, top_k)) for kind in KINDS} for of in (bench.step, lambda arm: bench.generate(arm, 2)))
            for kind in KINDS:
                arm = Arm(kind, top_k)
                assert steps[kind]["rows"] == expected_rows(arm, TOKENS, passes=2)
                assert [one["rows"] for one in runs[kind]] == [expected_rows(arm, n, passes=1) for n in (TOKENS, SIZE.sequences)]
                assert 0 < steps[kind]["exchange"] < steps[kind]["step"]
            assert steps[FINE]["rows"] == 4 * steps[BIGMAC]["rows"]
            assert steps[FINE]["rows"] + steps[FINE]["others"] == closed_form(Arm(FINE, top_k))
            projections = SIZE.layers * 2 * SIZE.hidden * SIZE.hidden // 4 * 4
            # Gathered once and reduced as gloo does: half of them from each rank, and all of them.
            assert steps[BIGMAC]["others"] - steps[FINE]["others"] == projections + 2 * projections
        with pytest.raises(RankError, match="rank 0: KeyError"):
            ranks.ask("step", arm=["dense", 1])


def closed_form(arm: Arm) -> float:
    """Bytes that two ranks send in a step, a reduce-scatter counted as the all-reduce that gloo makes of it.

    Without the 8 of each that say whether it was asked to stop: those are the training loop's.
    """
    cfg = RunConfig.model_validate(values(arm, SIZE, ranks=2))
    (segment,) = StepPlan.from_config(cfg).segments
    rows = [row for rank in range(2) for row in traffic(cfg, MeshShape.from_config(cfg.parallel, world=2), segment, rank=rank)]
    return sum(row.bytes * (1 + (row.kind == "reduce_scatter")) for row in rows) - 2 * 8


@pytest.mark.skipif(NO_NETWORK is not None, reason=str(NO_NETWORK))
def test_ranks_in_namespaces_on_a_limited_wire():
    rate = 40e6
    with network.Network(2) as wire, Ranks(2, wire, worker=WORKER) as ranks:
        ranks.ask("build", size=list(SIZE))
        bench = measure.Bench(ranks, wire, SIZE, say=print)
        free = bench.step(Arm(FINE, 8))
        wire.limit(rate)
        step = bench.step(Arm(FINE, 8))
        assert step["exchange"] > 8 * step["rows"] / rate
        for one in (free, step):
            assert 0.99 < (one["interface"] - one["others"]) / one["rows"] < 1.05


@pytest.mark.skipif(NO_NETWORK is not None, reason=str(NO_NETWORK))
@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_nothing_is_left_when_somebody_ends_it(end, tmp_path):
    command = [sys.executable, str(EXAMPLE / "run.py"), "--name", str(tmp_path / "x")]
    env = os.environ | {"PYTHONPATH": str(EXAMPLE.parents[1])}
    heard = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}  # tests started in the background ignore it
    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **heard)
    name = f"{network.PREFIX}-{process.pid}-1"
    try:
        while f"{name}\n" not in namespaces() and process.poll() is None:
            time.sleep(0.05)
        ranks = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True).stdout.split()
        process.send_signal(end)
        assert process.wait(timeout=60) not in (0, None)
    finally:
        process.kill()
    assert f"{network.PREFIX}-{process.pid}-" not in namespaces()
    assert not [pid for pid in ranks if Path("/proc", pid).exists()]


def namespaces() -> str:
    """Names, a line each."""
    return "".join(f"{line.split()[0]}\n" for line in network.run("ip", "netns", "list").splitlines())


@pytest.mark.parametrize("missing", ["root", "tools"])
def test_where_there_can_be_no_network_a_sentence_says_so(missing, tmp_path):
    lines = "import os, sys, runpy; os.geteuid = lambda: 1000" if missing == "root" else "import os, sys, runpy"
    script = f"{lines}; sys.path.insert(0, {str(EXAMPLE)!r}); sys.argv = ['run.py', '--name', {str(tmp_path / 'x')!r}]"
    path = {"tools": str(tmp_path), "root": os.environ["PATH"]}[missing]
    command = [sys.executable, "-c", f"{script}; runpy.run_path({str(EXAMPLE / 'run.py')!r}, run_name='__main__')"]
    env = os.environ | {"PATH": path, "PYTHONPATH": str(EXAMPLE.parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=env)
    assert done.returncode == 1 and done.stdout == "" and not list(tmp_path.iterdir())
    assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr
    assert ("iproute2" in done.stderr) if missing == "tools" or network.shutil.which("tc") is None else "sudo" in done.stderr


class Arithmetic:
    """Ranks and network in one: a step takes the time of its bytes on the wire and a tenth of a second for the rest."""

    def __init__(self):
        self.rate = None

    def limit(self, rate: float | None) -> None:
        self.rate = rate

    def _answer(self, arm: list, rows: float) -> dict:
        kind, top_k = arm
        rows, dense = rows * top_k / (4 if kind == BIGMAC else 1), 1e4
        a, d = (0.0 if self.rate is None else 8 * 2 * size / self.rate for size in (rows, dense))
        answer = {"step": 0.1 + a + d, "spans": [(0.0, a)], "bytes": {"rows": rows, "counts": dense}, "interface": rows + dense}
        return answer

    def ask(self, do: str, *, arm: list, new: int = 1, rows: int = 0) -> list:
        if do == "step":
            return [self._answer(arm, 1e6)] * 2
        return [[self._answer(arm, 5e5), *[self._answer(arm, 1e4)] * (new - 1)]] * 2


def test_the_wire_is_set_to_the_papers_share_and_the_tables_follow(tmp_path, capsys):
    there = Arithmetic()
    found = measure.measure(measure.Bench(there, there, SIZE, say=lambda text: None), rounds=3, sweep=[1e8, 1e6], sweep_rounds=1)
    top4, top8 = (found["training"][top_k]["paper"] for top_k in TOP_K)
    assert measure.share(top4[FINE]) == pytest.approx(0.841, abs=0.005)
    assert measure.share(top8[FINE]) == pytest.approx(0.918, abs=0.005)
    assert report.ratio(top4) == pytest.approx(2.71, abs=0.05) and report.ratio(top8) == pytest.approx(3.21, abs=0.06)
    assert round(report.ceiling(0.841), 2) == 2.71 and round(report.ceiling(0.918), 2) == 3.21
    made = {"command": "x", "date": "y", "commit": "z", "machine": "m", "ranks": 2, "load": [0, 0], "seconds": 1.0}
    report.write(json.loads(json.dumps(made | {"size": SIZE._asdict()} | found)), tmp_path / "results.json")
    text = (tmp_path / "results.md").read_text()
    assert f"**{report.ratio(top4):.2f}x**" in text and "| 0.2500 |" in text and "| no limit | 0.0%, 0.10 (0.10-0.10)" in text
    assert (tmp_path / "results.png").stat().st_size > 10_000


def test_overlapping_seeds_make_no_claim():
    def runs(**losses):
        return [{"arm": arm.replace("_", "-"), "validation": [[1, loss]]} for arm, of in losses.items() for loss in of]

    text = quality.verdicts(runs(BigMac=[1.0, 1.2, 1.1], fine_grained=[1.15, 1.3, 1.4], vanilla=[2.0, 2.1, 2.2]))
    assert text.count("overlap") == 1 and "BigMac and fine-grained: the spreads of the seeds overlap" in text
    assert "- BigMac is lower than vanilla" in text and "- fine-grained is lower than vanilla" in text
