"""The NPU tier: the real torch_npu over a stand-in for CANN and an NPU. Runs in an environment of its own by `make test-npu`."""

import importlib.util
import sys
from pathlib import Path

import pytest

SUPPORT = Path(__file__).parent / "support"
HERE = Path(__file__).parent
sys.path.insert(0, str(SUPPORT))
AVAILABLE = importlib.util.find_spec("torch_npu") is not None

if AVAILABLE:
    import stand_in

    stand_in.prepare()


def pytest_configure(config):
    config.addinivalue_line("markers", "npu_check(wrapper, column): the cell of docs/npu-checks.md that this test fills")


@pytest.hookimpl(tryfirst=True)
def pytest_ignore_collect(collection_path, config):
    """Without torch_npu the tier is one skip, not a hundred failing imports."""
    if not AVAILABLE and collection_path.is_relative_to(HERE) and collection_path.name.startswith("test_"):
        return collection_path.name != "test_npu_tier.py"
    return None
