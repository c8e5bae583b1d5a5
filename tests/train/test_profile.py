"""The profiler window."""

import gzip
import json

import pytest
import torch

from llmtrain.config.train import ProfileConfig
from llmtrain.train.profile import StepProfiler


def run(cfg, folder, *, first: int = 0, steps: int = 6) -> None:
    with StepProfiler(cfg, folder, 0) as profiler:
        for index in range(first, first + steps):
            with torch.profiler.record_function(f"step {index + 1}"):
                torch.ones(8, 8) @ torch.ones(8, 8)
            profiler.step(index)


def recorded(path) -> set[str]:
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    return {event["name"] for event in events if str(event.get("name", "")).startswith("step ")}


@pytest.mark.parametrize("start, steps, names", [(3, 2, {"step 3", "step 4"}), (1, 1, {"step 1"}), (1, 3, {"step 1", "step 2", "step 3"})])
def test_exactly_the_window_is_recorded(tmp_path, start, steps, names):
    run(ProfileConfig(start=start, steps=steps), tmp_path)
    stem = f"rank-0-steps-{start}-{start + steps - 1}"
    assert recorded(tmp_path / "profile" / f"{stem}.json.gz") == names
    assert "aten::mm" in (tmp_path / "profile" / f"{stem}.txt").read_text()


def test_nothing_is_written_without_a_window(tmp_path):
    run(None, tmp_path)
    run(ProfileConfig(start=3, steps=2), tmp_path, first=10)
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_ends_inside_the_window_says_so(tmp_path):
    with pytest.warns(UserWarning, match="ended inside the window"):
        run(ProfileConfig(start=3, steps=20), tmp_path)


def test_memory_needs_cuda(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("CUDA is here")
    with pytest.warns(UserWarning, match="need CUDA"):
        run(ProfileConfig(start=2, steps=1, memory=True), tmp_path)
