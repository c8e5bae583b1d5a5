"""One contender in a process of its own: reads a JSON request per line, answers with a JSON line.

Requests: {"do": "build", ...}, {"do": "steps", "count": N}, {"do": "memory", ...}, {"do": "profile"}, {"do": "gemm"}.
"""

import importlib
import os
import resource
import time

import torch
from torch.nn import functional as F

from train_peers.answering import answer_requests
from train_peers.shape import Shape

IMPORTS = {
    "us": ["llmtrain.stages.session"],
    "hf": ["transformers.models.llama.modeling_llama"],
    "litgpt": ["litgpt.model", "litgpt.utils"],
}
IMPORTS["titan"] = ["torchtitan.models.llama3", "torchtitan.components.loss", "torchtitan.distributed.compile"]
PROBE = (4096, 1024, 1024)


class Worker:
    """The state between requests."""

    def __init__(self):
        self.contender, self.taken = None, 0

    def build(self, *, name: str, shape: dict, dtype: str, compiled: bool, overrides: list[str]) -> dict:
        """Import, then build the model and optimizer; returns the resident set after the imports, and the parameters.

        `overrides` are words of a command line, for llmtrain alone.
        """
        from train_peers import peers, us

        for module in IMPORTS[name.split("-")[0]]:
            importlib.import_module(module)
        imported = _status("VmRSS")
        made = Shape(**shape)
        if name == "us":
            self.contender = us.build(made, dtype=dtype, compiled=compiled, overrides=overrides)
        else:
            self.contender = peers.build(name, made, dtype=dtype, compiled=compiled)
        if self.contender.parameters != made.parameters:
            raise ValueError(f"{name} has {self.contender.parameters:,} parameters, not {made.parameters:,}")
        return {"imported": imported, "parameters": made.parameters}

    def steps(self, *, count: int) -> dict:
        """Take `count` steps; returns the seconds and the loss of each, and what all of them took of CPU time and page faults."""
        seconds, losses = [], []
        before = resource.getrusage(resource.RUSAGE_SELF)
        for _ in range(count):
            started = time.perf_counter()
            losses.append(self.contender.step(self.taken))
            seconds.append(time.perf_counter() - started)
            self.taken += 1
        after = resource.getrusage(resource.RUSAGE_SELF)
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        system, faults = after.ru_stime - before.ru_stime, after.ru_minflt - before.ru_minflt
        return {"seconds": seconds, "losses": losses, "cpu": cpu, "system": system, "faults": faults}

    def peak(self) -> dict:
        """The process's peak resident set so far, in bytes."""
        return {"peak": _status("VmHWM")}

    def profile(self, *, rows: int) -> dict:
        """One profiled step."""
        from train_peers.profiling import profile_step

        text, shares, seconds = profile_step(lambda: self.steps(count=1), rows=rows)
        return {"text": text, "shares": shares, "seconds": seconds}

    def gemm(self) -> dict:
        """GFLOP/s of a matrix product, the best of four, in fp32 and bf16."""
        rows, inner, columns = PROBE
        rates = {}
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            a, b = torch.randn(rows, inner).to(dtype), torch.randn(columns, inner).to(dtype)
            F.linear(a, b)
            best = float("inf")
            for _ in range(4):
                started = time.perf_counter()
                F.linear(a, b)
                best = min(best, time.perf_counter() - started)
            rates[name] = 2 * rows * inner * columns / best / 1e9
        return rates


def _status(field: str) -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))


def main() -> None:
    """Answer until standard input ends."""
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    worker = Worker()
    answer_requests(worker)
    if hasattr(worker.contender, "close"):
        worker.contender.close()


if __name__ == "__main__":
    main()
