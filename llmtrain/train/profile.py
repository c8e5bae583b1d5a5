"""A window of steps recorded by torch.profiler, and a memory snapshot."""

import warnings
from pathlib import Path

import torch

from llmtrain.compat import dump_memory_snapshot, record_memory_history
from llmtrain.config.train import ProfileConfig

ROWS = 40
MEMORY_ENTRIES = 1_000_000  # allocations kept for the snapshot


class StepProfiler:
    """Context around the loop; `step(index)` after each step. Records steps `cfg.start` to `cfg.start + cfg.steps - 1`, counted from 1.

    Writes to `folder/profile/`: `rank-R-steps-A-B.json.gz` (Chrome trace; open it in Perfetto), the same name `.txt` (the operators that
    took most time), and with `cfg.memory` on CUDA `.pickle` (pytorch.org/memory_viz). `cfg` None records nothing. A window that a resumed
    run is already past is not recorded. Accelerator kernels are in the trace where torch.profiler supports the device; on others,
    operators on the host are.
    """

    def __init__(self, cfg: ProfileConfig | None, folder: Path, rank: int):
        self.cfg, self.rank = cfg, rank
        self.folder = Path(folder) / "profile" if cfg else None
        self._profile: torch.profiler.profile | None = None
        self._first = 1

    def __enter__(self) -> "StepProfiler":
        if self.cfg and self.cfg.start == 1:
            self._start(1)
        return self

    def step(self, index: int) -> None:
        """Step `index` (from 0) is done."""
        if self.cfg is None:
            return
        done = index + 1
        if self._profile is not None and done >= self.cfg.start + self.cfg.steps - 1:
            self._stop(done)
        elif self._profile is None and done + 1 == self.cfg.start:
            self._start(done + 1)

    def __exit__(self, kind, *rest) -> None:
        if self._profile is not None:
            self._profile.stop()
            self._profile = None
            warnings.warn(f"metrics.profile: the run ended inside the window that began at step {self._first}; no trace", stacklevel=2)

    @property
    def _memory(self) -> bool:
        return self.cfg.memory and torch.cuda.is_available()

    def _start(self, first: int) -> None:
        if self.cfg.memory and not torch.cuda.is_available():
            warnings.warn("metrics.profile.memory: memory snapshots need CUDA; the trace alone is recorded", stacklevel=3)
        self._first = first
        if self._memory:
            record_memory_history(torch.cuda, entries=MEMORY_ENTRIES)
        self._profile = torch.profiler.profile(activities=torch.profiler.supported_activities(), record_shapes=True, acc_events=True)
        self._profile.start()

    def _stop(self, last: int) -> None:
        profile, self._profile = self._profile, None
        profile.stop()
        self.folder.mkdir(parents=True, exist_ok=True)
        stem = self.folder / f"rank-{self.rank}-steps-{self._first}-{last}"
        profile.export_chrome_trace(f"{stem}.json.gz")
        averages = profile.key_averages()
        order = "self_device_time_total" if any(event.self_device_time_total for event in averages) else "self_cpu_time_total"
        Path(f"{stem}.txt").write_text(averages.table(sort_by=order, row_limit=ROWS) + "\n")
        if self._memory:
            dump_memory_snapshot(torch.cuda, f"{stem}.pickle")
            record_memory_history(torch.cuda, entries=None)
