"""What the script by which a row was run says, where the row's columns have no room for it."""

from collections.abc import Mapping
from functools import cache
from pathlib import Path

import yaml

SCRIPTS = Path(__file__).parent / "data" / "scripts.yaml"
ADDED = ("notes", "recompute")
"""Columns whose text is added to what the row says; `-` before it takes the row's own words away."""


def completed(row: Mapping[str, str]) -> dict[str, str]:
    """`row` with what its script says, if it is known; `dense_layers`, `layers_per_stage` and `cp_kind` are columns of scripts alone."""
    found = dict(row)
    for name, value in _scripts().get(row["model"], {}).items():
        text = str(value)
        if name in ADDED:
            own = "" if text.startswith("-") else found[name]
            text = "; ".join(part for part in (own, text.removeprefix("-").strip()) if part)
        found[name] = text
    return found


@cache
def _scripts() -> dict[str, dict[str, str | int]]:
    return yaml.safe_load(SCRIPTS.read_text())
