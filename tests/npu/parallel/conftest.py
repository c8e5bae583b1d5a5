"""Worlds of processes whose NPUs are stand-ins."""

import os
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
SITE, WORLDS = HERE.parent / "support" / "site", HERE.parents[1] / "support"
sys.path.insert(0, str(WORLDS))


@pytest.fixture(scope="session")
def npu_world(tmp_path_factory):
    """`run(target, ranks, **args)`: a function of a module of this folder, of tests/support or tests/npu/support on every rank."""
    from worlds import run_world

    patch = pytest.MonkeyPatch()
    patch.setenv("PYTHONPATH", os.pathsep.join([str(SITE), str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]))
    patch.setenv("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")

    def run(target: str, ranks: int, **args):
        return run_world(target, ranks, args=args, folder=tmp_path_factory.mktemp("world"), timeout=300.0, fresh=True)

    yield run
    patch.undo()
