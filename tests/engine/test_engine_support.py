"""The table of engines and devices is that of the documentation, and what it refuses is refused."""

from pathlib import Path

import pytest

from llmtrain.config.run import RunConfig
from llmtrain.engine.base import ENGINES, check_engine
from llmtrain.engine.support import DEVICES, SUPPORT, Cell, table
from llmtrain.errors import UserError
from llmtrain.layout.mesh import MeshShape
from llmtrain.stages import session  # noqa: F401 - registers the engines

PAGE = Path(__file__).parents[2] / "docs" / "engines.md"


def test_the_page_has_the_table():
    assert table() in PAGE.read_text(), "docs/engines.md: put the output of `python -m llmtrain.engine.support` in the place of its table"


def test_every_engine_of_this_package_has_a_cell_for_every_device():
    assert set(SUPPORT) == set(ENGINES) - {"table"}  # tests/support/fake_engine.py
    assert all(tuple(cells) == DEVICES for cells in SUPPORT.values())


def test_what_the_table_refuses_is_refused(monkeypatch):
    monkeypatch.setitem(SUPPORT, "native", {"cpu": Cell("no reason", refused=True)})
    with pytest.raises(UserError, match="engine native on cpu: no reason"):
        check_engine(RunConfig.model_validate({"train": {"steps": 1}}), shape=MeshShape(), device="cpu")
