"""The engines that are packages of their own: `make test-engines`, in an environment that has them. Elsewhere these tests are skipped."""

import importlib.util
import os

import pytest
import worlds

if importlib.util.find_spec("deepspeed") is not None:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # The second is imported by every optimizer of DeepSpeed, and brings torch's compiler with it: 2 s of each rank.
    worlds.PRELOADED += ["deepspeed", "deepspeed.runtime.zero.muon.muon_optimizer"]


def pytest_collection_modifyitems(items):
    missing = importlib.util.find_spec("deepspeed") is None
    skip = pytest.mark.skip(reason="deepspeed is not installed: make test-engines")
    for item in items:
        if missing and item.get_closest_marker("deepspeed"):
            item.add_marker(skip)
