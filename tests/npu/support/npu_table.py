"""docs/npu-checks.md: which check of which wrapper is made, as a table that the tests write and hold up to date."""

from collections.abc import Iterable, Mapping
from pathlib import Path

PAGE = Path(__file__).resolve().parents[3] / "docs/npu-checks.md"
COLUMNS = ("schema", "fake", "host", "numerics", "gradients", "2-process")
NAME = "checks"


def render(cells: Iterable[tuple[str, str]]) -> str:
    """The table of these (wrapper, column). Raises ValueError for a column that it does not have."""
    cells = set(cells)
    unknown = {column for _, column in cells} - set(COLUMNS)
    if unknown:
        raise ValueError(f"npu_check: column {', '.join(sorted(unknown))} is not one of {', '.join(COLUMNS)}")
    lines = [f"| wrapper | {' | '.join(COLUMNS)} |", "|---|" + "---|" * len(COLUMNS)]
    for wrapper in sorted({wrapper for wrapper, _ in cells}):
        lines.append(f"| {wrapper} | {' | '.join('yes' if (wrapper, column) in cells else '-' for column in COLUMNS)} |")
    return "\n".join(lines)


def section(name: str) -> str:
    """What stands between the page's marks of this name; empty where the page has none."""
    _, _, rest = PAGE.read_text().partition(_begin(name)) if PAGE.exists() else ("", "", "")
    return rest.partition(_end(name))[0].strip() if rest else ""


def replace(name: str, text: str) -> None:
    """Write `text` between the page's marks of this name. Raises ValueError where it has none."""
    page = PAGE.read_text()
    before, begin, rest = page.partition(_begin(name))
    _, end, after = rest.partition(_end(name))
    if not begin or not end:
        raise ValueError(f"{PAGE.name} has no lines `{_begin(name)}` and `{_end(name)}`")
    PAGE.write_text(f"{before}{begin}\n{text}\n{end}{after}")


def write(outcomes: Mapping[tuple[str, str], list[str]]) -> None:
    """Write the table of the cells of which every test passed."""
    replace(NAME, render(cell for cell, results in outcomes.items() if set(results) == {"passed"}))


def _begin(name: str) -> str:
    return f"<!-- {name}: written by `make test-npu ARGS=--write-table` -->"


def _end(name: str) -> str:
    return f"<!-- end of {name} -->"
