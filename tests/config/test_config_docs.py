"""The page on configuration names options that exist."""

import re
from pathlib import Path

import pytest

from llmtrain.config import fields

PAGE = (Path(__file__).parents[2] / "docs" / "configuration.md").read_text()
MAPPING = PAGE.partition("## Coming from elsewhere")[2]
NAMES = sorted(
    {name for line in MAPPING.splitlines() if line.startswith("| `") for name in re.findall(r"`([a-z][\w.]*)`", line.split("|")[2])}
)


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("auto",)])
def test_option_of_the_mapping_exists(name):
    assert fields.types_at(tuple(int(key) if key.isdigit() else key for key in name.split(".")))


def test_the_mapping_is_found():
    assert len(NAMES) > 50
