"""docs/first-day-on-hardware.md leads to every page that says something was not run on hardware, and its commands are real ones."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs" / "first-day-on-hardware.md"
UNCHECKED = re.compile(r"not (?:been )?run on (?:their )?hardware|has run on hardware|not tried on hardware|tried on hardware")


def pages() -> list[str]:
    return [page.name for page in sorted((ROOT / "docs").glob("*.md")) if page != PAGE and UNCHECKED.search(page.read_text())]


def test_there_are_such_pages():
    assert {"tensor-parallel.md", "kernels.md", "selftest.md"} <= set(pages())


@pytest.mark.parametrize("name", pages())
def test_the_page_leads_there(name):
    assert re.search(rf"\]\({re.escape(name)}[#)]", PAGE.read_text()), f"{name} says that something was not run on hardware"


def test_rows_are_ordered_by_risk():
    for section in PAGE.read_text().split("\n## ")[2:5]:
        risks = re.findall(r"^\| (high|medium|low) \|", section, re.MULTILINE)
        assert len(risks) >= 3 and risks == sorted(risks, key=("high", "medium", "low").index)
        assert all(row.count(" | ") == 4 for row in section.splitlines() if re.match(r"\| (high|medium|low)", row))


def test_every_command_is_understood():
    from llmtrain.cli import VERBS

    commands = re.findall(r"`(?:srun )?llmtrain ([a-z]+)", PAGE.read_text())
    assert len(commands) >= 8 and set(commands) <= set(VERBS)
