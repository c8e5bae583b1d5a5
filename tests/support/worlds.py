"""Real worlds of processes for tests: a function run on every rank over gloo."""

import os
import pickle
import socket
import subprocess
import sys
from pathlib import Path

SUPPORT = Path(__file__).parent


def run_world(target: str, ranks: int, *, args: dict, folder: Path, timeout: float = 600.0) -> object:
    """Call `module:function(**args)` on `ranks` processes; return rank 0's result. A failing rank fails the test with its output."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    given, result = folder / "args.pkl", folder / "result.pkl"
    given.write_bytes(pickle.dumps(args))
    env = os.environ | {
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(SUPPORT), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    command = [sys.executable, __file__, target, str(given), str(result)]
    logs = [folder / f"rank-{rank}.txt" for rank in range(ranks)]
    processes = []
    for rank, log in enumerate(logs):
        with log.open("w") as out:
            rank_env = env | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            processes.append(subprocess.Popen(command, env=rank_env, stdout=out, stderr=subprocess.STDOUT))
    try:
        codes = [process.wait(timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    if any(codes):
        first = next(rank for rank, code in enumerate(codes) if code)
        raise AssertionError(f"rank {first} of {ranks} ended with {codes[first]}:\n{logs[first].read_text()[-6000:]}")
    return pickle.loads(result.read_bytes())


if __name__ == "__main__":
    import importlib

    module, function = sys.argv[1].split(":")
    value = getattr(importlib.import_module(module), function)(**pickle.loads(Path(sys.argv[2]).read_bytes()))
    if os.environ["RANK"] == "0":
        Path(sys.argv[3]).write_bytes(pickle.dumps(value))
    sys.stdout.flush()
    os._exit(0)  # targets leave their groups as they are, and a thread of gloo may not outlive Python's own end
