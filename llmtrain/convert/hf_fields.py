"""Access to config.json whose errors name file, field, value and what is allowed."""

import json
from collections.abc import Mapping
from typing import Any

from llmtrain.errors import UserError


class Fields:
    """The content of a config.json."""

    def __init__(self, config: Mapping[str, Any], where: str):
        self.config, self.where = config, where

    def integer(self, name: str, default: int | None = None, *, least: int = 1) -> int:
        """An integer of at least `least`; must be there if it has no default."""
        value = self.config.get(name)
        if value is None and default is not None:
            return default
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise self.error(name, value, f"an integer > {least - 1}")
        return value

    def number(self, name: str, default: float) -> float:
        """A positive number."""
        value = self.config.get(name, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
            raise self.error(name, value, "a number > 0")
        return float(value)

    def flag(self, name: str, default: bool = False) -> bool:
        """A truth value; null is the default."""
        value = self.config.get(name)
        if value is not None and not isinstance(value, bool):
            raise self.error(name, value, "true or false")
        return default if value is None else value

    def only(self, name: str, allowed: Any) -> None:
        """Raise UserError if the field is there and has another value."""
        value = self.config.get(name, allowed)
        if value != allowed:
            raise self.error(name, value, json.dumps(allowed))

    def head_dim(self, values: Mapping[str, Any]) -> int:
        """Width of a head, by default hidden / heads of the model section `values`."""
        heads, hidden = values["attention"]["heads"], values["hidden"]
        if self.config.get("head_dim") is None and hidden % heads:
            raise self.error("head_dim", None, f"an integer, since hidden_size {hidden} is not a multiple of num_attention_heads {heads}")
        return self.integer("head_dim", hidden // heads)

    def error(self, name: str, value: Any, allowed: str) -> UserError:
        """What to raise for a field that cannot be imported."""
        given = "is missing" if value is None else f"{json.dumps(value)[:80]} cannot be imported"
        return UserError(f"{self.where}: {name} {given}; allowed: {allowed}")
