"""The engines that are packages of their own: `make test-engines`, in an environment that has them. Elsewhere these tests are skipped."""

import importlib.util
import os
from pathlib import Path

import pytest
import worlds

if importlib.util.find_spec("deepspeed") is not None:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # The second is imported by every optimizer of DeepSpeed, and brings torch's compiler with it: 2 s of each rank.
    worlds.PRELOADED += ["deepspeed", "deepspeed.runtime.zero.muon.muon_optimizer"]


def pytest_addoption(parser):
    parser.addoption("--parity-page", type=Path, help="write what was measured of rows to this file")


def pytest_collection_modifyitems(items):
    missing = importlib.util.find_spec("deepspeed") is None
    skip = pytest.mark.skip(reason="deepspeed is not installed: make test-engines")
    for item in items:
        if missing and item.get_closest_marker("deepspeed"):
            item.add_marker(skip)


def pytest_terminal_summary(terminalreporter, config):
    place = config.getoption("--parity-page", default=None)
    if place is not None:
        from engine_page import page

        reports = [report for kind in ("passed", "failed") for report in terminalreporter.stats.get(kind, ()) if report.when == "call"]
        place.write_text(page(reports))
        terminalreporter.write_line(f"{place} written")
