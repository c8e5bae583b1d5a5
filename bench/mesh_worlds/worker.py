"""One rank: reads a JSON request per line, answers with a JSON line.

Requests: {"do": "build", ...}, {"do": "steps", "count": N}, {"do": "record"}, {"do": "profile", ...}.
"""

import importlib
import os
import resource
import time

import torch
import torch.distributed as dist
from train_peers.answering import answer_requests
from train_peers.shape import Shape

from mesh_worlds.cases import CASES, batches
from mesh_worlds.recorder import Recorder


class Worker:
    """The state between requests."""

    def __init__(self):
        self.trainer, self.taken = None, 0

    def build(self, *, side: str, case: str, shape: dict, weights: str, port: int) -> dict:
        """Leave the world before, join one that meets at `port`, and build the model."""
        self.close()
        os.environ["MASTER_PORT"] = str(port)
        made, self.taken = Shape(**shape), 0
        self.batches = batches(made)
        if side != "hand":
            from mesh_worlds.ours import Trainer

            self.trainer = Trainer(CASES[case], made, engine="native" if side == "ours" else side)
        else:
            dist.init_process_group("gloo")
            script = importlib.import_module(f"by_hand.{CASES[case].script}")
            self.trainer = script.Trainer(made, torch.load(weights, weights_only=True))
        return {}

    def close(self) -> None:
        """Leave the world."""
        trainer, self.trainer = self.trainer, None
        if hasattr(trainer, "close"):
            trainer.close()
        elif dist.is_initialized():
            dist.destroy_process_group()

    def _step(self) -> float:
        tokens, targets = self.batches[self.taken % len(self.batches)]
        self.taken += 1
        return self.trainer.step(tokens, targets)

    def steps(self, *, count: int) -> dict:
        """Take `count` steps; returns the losses, and what all of them took of CPU time (user and system, all threads) and of the clock."""
        before, started = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
        losses = [self._step() for _ in range(count)]
        seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF)
        user, system = after.ru_utime - before.ru_utime, after.ru_stime - before.ru_stime
        return {"losses": losses, "cpu": user + system, "system": system, "seconds": seconds}

    def record(self) -> dict:
        """Take a step and return its collectives."""
        with Recorder() as recorder:
            loss = self._step()
        return {"loss": loss, "calls": recorder.calls}

    def profile(self, *, rows: int) -> dict:
        """Take a step under torch's profiler; returns its table by self CPU time."""
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            self._step()
        return {"text": profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=rows, max_name_column_width=60)}


def main() -> None:
    """Answer until standard input ends."""
    torch.set_num_threads(1)
    worker = Worker()
    answer_requests(worker)
    worker.close()


if __name__ == "__main__":
    main()
