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


def pytest_addoption(parser):
    parser.addoption("--write-table", action="store_true", help="write the table of checks that passed into docs/npu-checks.md")


def pytest_configure(config):
    config.addinivalue_line("markers", "npu_check(wrapper, column): the cell of docs/npu-checks.md that this test fills")
    if not hasattr(config, "workerinput"):  # the process that hears of all tests, with or without xdist
        config.pluginmanager.register(Table(), "npu-table")


@pytest.hookimpl(tryfirst=True)
def pytest_ignore_collect(collection_path, config):
    """Without torch_npu the tier is one skip, not a hundred failing imports."""
    if not AVAILABLE and collection_path.is_relative_to(HERE) and collection_path.name.startswith("test_"):
        return collection_path.name != SPEAKER
    return None


def pytest_runtest_setup(item):
    if item.path.is_relative_to(HERE):
        item.user_properties += [("npu_check", list(mark.args)) for mark in item.iter_markers("npu_check")]


class Table:
    """What came of each cell's tests, and the page that is written of it."""

    def __init__(self):
        self.outcomes = defaultdict(list)
        self.files: set[str] = set()

    def pytest_runtest_logreport(self, report):
        self.files.add(Path(report.nodeid.partition("::")[0]).name)
        if report.when == "call" or report.outcome != "passed":
            for name, value in report.user_properties:
                if name == "npu_check":
                    self.outcomes[tuple(value)].append(report.outcome)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session, exitstatus):
        if not session.config.getoption("--write-table", default=False):
            return
        import npu_table

        left_out = {path.name for path in HERE.rglob("test_*.py")} - self.files
        if exitstatus == 0 and not left_out:
            npu_table.write(self.outcomes)
        else:
            print(
                "\ndocs/npu-checks.md: table not written,", "not every test passed" if exitstatus else f"{', '.join(left_out)} did not run"
            )
