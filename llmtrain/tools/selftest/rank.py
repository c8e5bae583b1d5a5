"""What the processes of a self-test run: `python -m llmtrain.tools.selftest.rank JOBS`, which starts the ranks, then is one."""

import ctypes
import json
import os
import signal
import sys
from pathlib import Path

from llmtrain.tools.launch import is_launched, run_local


def main(path: Path) -> int:
    """Start the ranks that the file of jobs asks for, or, being one of them, do the jobs one after the other."""
    told = json.loads(path.read_text())
    if not is_launched():
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG: a self-test that is killed leaves nothing behind
        logs = path.parent / "ranks"
        return run_local([str(path)], told["ranks"], logs=logs, command=[sys.executable, "-m", "llmtrain.tools.selftest.rank"])
    _work(told, path.parent)
    sys.stdout.flush()
    sys.stderr.flush()
    # Meshes of many shapes were made and left as they are; a thread of gloo may not outlive Python's own end.
    os._exit(0)


def _work(told: dict, place: Path) -> None:
    import numpy as np

    from llmtrain.device import select
    from llmtrain.plugins import load_plugins
    from llmtrain.tools.selftest.bench_run import collectives, matmul, memory, train
    from llmtrain.tools.selftest.kernels_run import kernel, list_kernels
    from llmtrain.tools.selftest.parity_run import parity

    functions = {f.__name__: f for f in (parity, kernel, list_kernels, matmul, memory, collectives, train)}
    load_plugins(told["plugins"])
    device = select(told["device"], int(os.environ["LOCAL_RANK"]))
    device.set_current()
    for index, job in enumerate(told["jobs"]):
        values, arrays = functions[job["kind"]](device=device, **job["arguments"])
        if os.environ["RANK"] != "0":
            continue
        if arrays:
            np.savez(place / f"{index}.npz", **arrays)
        partial = place / f"{index}.partial"
        partial.write_text(json.dumps(values))
        partial.rename(place / f"{index}.json")


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
