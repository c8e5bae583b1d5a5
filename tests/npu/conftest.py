"""The NPU tier: the real torch_npu over a stand-in for CANN and an NPU. Runs in an environment of its own, by `make test-npu`."""

import importlib.util
import sys
from collections import defaultdict
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE / "support"), str(HERE.parent / "support")]
AVAILABLE = importlib.util.find_spec("torch_npu") is not None
SPEAKER = "test_stand_in.py"
"""The file that says, in the other tiers, why this one is left out."""

if AVAILABLE:
    import stand_in

    stand_in.prepare()

CELLS = pytest.StashKey[dict]()


def pytest_addoption(parser):
    parser.addoption("--write-table", action="store_true", help="write the table of checks that passed into docs/npu-checks.md")


def pytest_configure(config):
    config.addinivalue_line("markers", "npu_check(wrapper, column): the cell of docs/npu-checks.md that this test fills")
    config.stash[CELLS] = defaultdict(list)


@pytest.hookimpl(tryfirst=True)
def pytest_ignore_collect(collection_path, config):
    """Without torch_npu the tier is one skip, not a hundred failing imports."""
    if not AVAILABLE and collection_path.is_relative_to(HERE) and collection_path.name.startswith("test_"):
        return collection_path.name != SPEAKER
    return None


def pytest_runtest_setup(item):
    if not item.path.is_relative_to(HERE):
        return
    for mark in item.iter_markers("npu_check"):
        item.user_properties.append(("npu_check", list(mark.args)))


def pytest_runtest_logreport(report):
    """In the process that reports, xdist or not: what came of each cell."""
    if report.when == "call" or report.outcome != "passed":
        for name, value in report.user_properties:
            if name == "npu_check":
                CONFIG.stash[CELLS][tuple(value)].append(report.outcome)


def pytest_sessionstart(session):
    global CONFIG
    CONFIG = session.config


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session, exitstatus):
    if hasattr(session.config, "workerinput") or not session.config.getoption("--write-table", default=False):
        return
    import npu_table

    if exitstatus == 0:
        npu_table.write(session.config.stash[CELLS])
    else:
        print("\ndocs/npu-checks.md is not written: not every test passed")
