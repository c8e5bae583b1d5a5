"""Where chat templates run: jinja's immutable sandbox with what transformers offers to them.

It keeps a template from everything but its values. Against using up time and memory it has limits on the plainest ways alone.
"""

import json
from collections.abc import Callable
from datetime import datetime
from functools import cache
from typing import Any

OPEN, CLOSE = "\ufdd0", "\ufdd1"
"""Noncharacters of Unicode, which no text holds, around what a template marks as generated."""
LIMIT = 1 << 24
"""Characters that a template may make of one conversation, and that a product in it may have."""


@cache
def environment() -> Any:
    """A jinja environment in which a template can reach nothing but the values it is given.

    `raise_exception`, `strftime_now`, `tojson`, loop controls and `{% generation %}` are those of transformers.
    """
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Sandbox(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(("*", "**"))

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            sizes = [len(v) if isinstance(v, str | list | tuple) else v for v in (left, right)]
            if operator == "**" or not all(isinstance(v, int | float) for v in sizes) or abs(sizes[0] * sizes[1]) > LIMIT:
                raise TemplateError(f"{operator} of these values is not allowed in a template")
            return super().call_binop(context, operator, left, right)

    class Generation(Extension):
        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

        def _mark(self, caller: Callable[[], str]) -> str:
            return f"{OPEN}{caller()}{CLOSE}"

    def refuse(message: str) -> None:
        raise TemplateError(message)

    env = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation])
    env.globals |= {"raise_exception": refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
    env.filters["tojson"] = _json
    return env


def _json(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
