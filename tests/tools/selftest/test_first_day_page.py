"""docs/first-day-on-hardware.md leads to every page that says something was not run on hardware, and its commands are real ones."""

import re
from pathlib import Path

import pytest
from documented import understand

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


def spans() -> list[str]:
    """What stands between backquotes outside of links, in order, each once."""
    return list(dict.fromkeys(re.findall(r"`([^`\n]+)`", PAGE.read_text())))


COMMANDS = [span for span in spans() if re.match(r"(?:srun )?llmtrain [a-z]+ .", span)]
OPTIONS = [span for span in spans() if span.startswith("--") and span not in ("--cpu-bind=none", "--ranks 8")]
"""Of a run: one of srun and one of selftest left out."""


def test_there_are_commands():
    assert len(COMMANDS) >= 7 and len(OPTIONS) >= 8


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_understood(command):
    understand(command.replace("...", "-c configs/quickstart.yaml --device npu"))


@pytest.mark.parametrize("options", OPTIONS)
def test_options_of_a_run_are_understood(options):
    understand(f"llmtrain train -c configs/quickstart.yaml {options}")


def test_every_verb_exists():
    from llmtrain.cli import VERBS

    assert set(re.findall(r"`(?:srun )?llmtrain ([a-z]+)", PAGE.read_text())) <= set(VERBS)
