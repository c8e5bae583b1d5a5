"""Real worlds of processes for tests: a function run on every rank over gloo."""

import importlib
import multiprocessing
import os
import pickle
import subprocess
import sys
import traceback
from collections.abc import Callable
from contextlib import contextmanager
from multiprocessing import forkserver
from pathlib import Path

from llmtrain.tools.launch import reserved_port

SUPPORT = Path(__file__).parent
ROOT = SUPPORT.parents[1]
PRELOADED = ["torch.distributed.tensor", "llmtrain.engine.native", "llmtrain.train.loop"]
"""What ranks find imported: their processes are forks of one that imported it once, which is most of what a small world costs."""


def run_world(target: str, ranks: int, *, args: dict, folder: Path, timeout: float = 600.0, fresh: bool = False) -> object:
    """Call `module:function(**args)` on `ranks` processes; return rank 0's result. A failing rank fails the test with its output.

    fresh: every rank an interpreter of its own, for what has to happen when Python starts.
    """
    given, result = folder / "args.pkl", folder / "result.pkl"
    given.write_bytes(pickle.dumps(args))
    world = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    start = _interpreter if fresh else _fork
    logs = [folder / f"rank-{rank}.txt" for rank in range(ranks)]
    processes = []
    with reserved_port() as port:
        try:
            for rank, log in enumerate(logs):
                env = os.environ | world | {"MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank)}
                processes.append(start(env, log, target, given, result))
            codes = [process(timeout) for process, _ in processes]
        finally:
            for _, kill in processes:
                kill()
    if any(codes):
        first = next(rank for rank, code in enumerate(codes) if code)
        raise AssertionError(f"rank {first} of {ranks} ended with {codes[first]}:\n{logs[first].read_text()[-6000:]}")
    return pickle.loads(result.read_bytes())


Started = tuple[Callable[[float], int], Callable[[], None]]
"""Wait so many seconds for the exit code; kill."""


def _interpreter(env: dict[str, str], log: Path, *words) -> Started:
    env |= {"PYTHONPATH": os.pathsep.join([str(SUPPORT), *filter(None, [env.get("PYTHONPATH")])])}
    with log.open("w") as out:
        process = subprocess.Popen([sys.executable, __file__, *map(str, words)], env=env, stdout=out, stderr=subprocess.STDOUT)
    return process.wait, process.kill


def _fork(env: dict[str, str], log: Path, *words) -> Started:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with _environment(OMP_NUM_THREADS="1", PYTHONPATH=os.pathsep.join([str(ROOT), str(SUPPORT), os.environ.get("PYTHONPATH", "")])):
        forkserver.ensure_running()  # the server keeps the environment in which it was started
    process = context.Process(target=_forked, args=(env, log, *words), daemon=True)
    process.start()

    def wait(timeout: float) -> int:
        process.join(timeout)
        if process.exitcode is None:
            raise subprocess.TimeoutExpired(words[0], timeout)
        return process.exitcode

    return wait, process.kill


@contextmanager
def _environment(**values: str):
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _forked(env: dict[str, str], log: Path, *words) -> None:
    os.environ.clear()
    os.environ.update(env)
    with log.open("w") as out:
        for stream in (1, 2):
            os.dup2(out.fileno(), stream)
    try:
        call(*words)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def call(target: str, given: str | Path, result: str | Path) -> None:
    """Run `target` with the arguments stored in `given`, store what rank 0 gets in `result`, and end this process."""
    module, function = target.split(":")
    value = getattr(importlib.import_module(module), function)(**pickle.loads(Path(given).read_bytes()))
    if os.environ["RANK"] == "0":
        Path(result).write_bytes(pickle.dumps(value))
    sys.stdout.flush()
    os._exit(0)  # targets leave their groups as they are, and a thread of gloo may not outlive Python's own end


if __name__ == "__main__":
    call(*sys.argv[1:])
