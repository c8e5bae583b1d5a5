"""Help printed from the configuration's own documentation."""

import difflib
from collections.abc import Iterable
from textwrap import wrap
from typing import Any

from llmtrain.config import fields
from llmtrain.config.base import Section
from llmtrain.config.errors import ConfigError
from llmtrain.config.layer import dotted

WIDTH = 110


def options_help(section: str | None = None) -> str:
    """Every option of `section`, or of all: name, allowed values, default, documentation.

    Raises:
        ConfigError: no such section.
    """
    known = list(fields.root().model_fields)
    if section is not None and not fields.types_at(tuple(section.split("."))):
        near = difflib.get_close_matches(section, known, 1, 0.5)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"{section!r} is no section; allowed: {', '.join(known)}{hint}")
    prefix = section.split(".") if section else []
    chosen = [f for f in fields.walk() if list(f.path[: len(prefix)]) == prefix]
    plain = [f for f in chosen if len(f.path) == 1 and not isinstance(f.default, Section)]
    grouped = [f for f in chosen if f not in plain]
    return "\n".join([*_entries(plain), *_grouped(grouped)])


def _grouped(chosen: Iterable[fields.Field]) -> list[str]:
    lines, seen, group = [], set(), None
    for field in chosen:
        if field.path[0] != group:
            group = field.path[0]
            info = fields.root().model_fields[group]
            lines += ["", f"{group}: {info.description or ''}"]
        if isinstance(field.default, Section) or field.path in seen or field.path == (group,):
            continue
        seen.add(field.path)
        lines += _entries([field])
    return lines


def _entries(chosen: Iterable[fields.Field]) -> list[str]:
    lines = []
    for field in chosen:
        lines.append(f"  --{dotted(field.path)}  {_values(field.annotation)}{_default(field.default)}")
        lines += wrap(" ".join(field.doc.split()), WIDTH, initial_indent="      ", subsequent_indent="      ")
    return lines


def _values(annotation: Any) -> str:
    kinds = [k for s in fields.sections(annotation) if "kind" in s.model_fields for k in fields.literals(s, "kind")]
    return fields.allowed(annotation, brief=True) + (f" (kind {', '.join(kinds)})" if kinds else "")


def _default(value: Any) -> str:
    if value is None or value in ([], {}):
        return ""
    shown = str(value).lower() if isinstance(value, bool) else list(value) if isinstance(value, tuple) else value
    return f"  [{shown}]"
