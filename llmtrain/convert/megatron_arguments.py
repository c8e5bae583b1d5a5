"""Arguments of Megatron-LM and MindSpeed-LLM, as words of a command line or as a checkpoint keeps them. Needs no torch."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from llmtrain.config.yamlfile import scalar
from llmtrain.errors import UserError

LAUNCHER = ("nnodes", "nproc_per_node")
"""What torchrun is told before the script, of which the number of ranks follows."""
_VARIABLE = re.compile(r"\$\{?\w+")


def read_words(words: Sequence[str]) -> dict[str, Any]:
    """`["--lr", "1e-4", "--bf16", "--data-path", "1", "a", "2", "b"]` -> {"lr": 1e-4, "bf16": True, "data_path": [1, "a", 2, "b"]}.

    Everything up to a word that ends in `.py` is the launcher, of which LAUNCHER is kept. Names are those of Megatron's namespace. Of an
    option that is given twice the last counts, as in argparse. Raises UserError for a word that belongs to no option, and for a variable
    of the shell, whose value is not known here.
    """
    script = next((index for index, word in enumerate(words) if word.endswith(".py")), None)
    before, own = ([], words) if script is None else (words[:script], words[script + 1 :])
    launcher = {name: value for name, value in _options(before, strict=False).items() if name in LAUNCHER}
    return launcher | _options(own, strict=True)


def _options(words: Sequence[str], *, strict: bool) -> dict[str, Any]:
    found: dict[str, list[Any]] = {}
    name = None
    for word in words:
        if _VARIABLE.search(word) and strict:
            raise UserError(
                f"{word}: the value of a shell variable is not known here; put the values in, or call it from the script itself"
            )
        if word.startswith("--"):
            name, equals, value = word.removeprefix("--").partition("=")
            name = name.replace("-", "_")
            found[name] = [scalar(value)] if equals else []
        elif name is not None:
            found[name].append(scalar(word))
        elif strict:
            raise UserError(f"{word!r} belongs to no option; give the words after pretrain_gpt.py, or the whole command")
    return {name: _value(values) for name, values in found.items()}


def _value(values: list[Any]) -> Any:
    return True if not values else values[0] if len(values) == 1 else values


class Given:
    """Arguments by name, and which of them were looked at."""

    def __init__(self, values: Mapping[str, Any]):
        self.values = dict(values)
        self.used: set[str] = set()

    def __contains__(self, name: str) -> bool:
        """Whether it is there and says something: a checkpoint keeps None for what was not given."""
        return self.values.get(name) is not None

    def get(self, *names: str, default: Any = None) -> Any:
        """The first of `names` that is given."""
        self.used.update(names)
        return next((self.values[name] for name in names if name in self), default)

    def on(self, *names: str) -> bool:
        """Whether any of these switches is set."""
        self.used.update(names)
        return any(bool(self.values.get(name)) for name in names)

    def integer(self, *names: str, default: int | None = None) -> int | None:
        """As `get`, of a whole number."""
        return self._number(int, "an integer", names, default)

    def number(self, *names: str, default: float | None = None) -> float | None:
        """As `get`, of a number."""
        return self._number(float, "a number", names, default)

    def required(self, name: str) -> int:
        """A whole number without which there is no model."""
        value = self.integer(name)
        if value is None:
            raise UserError(f"{flag(name)} is missing")
        return value

    def list(self, name: str) -> list[Any]:
        """All words of an option, none if it is not given."""
        value = self.get(name, default=[])
        return list(value) if isinstance(value, list | tuple) else [value]

    def _number(self, kind: type, what: str, names: Sequence[str], default: Any) -> Any:
        self.used.update(names)
        name = next((name for name in names if name in self), None)
        if name is None:
            return default
        value = self.values[name]
        try:
            if isinstance(value, bool) or kind(value) != float(value):
                raise ValueError
            return kind(value)
        except (TypeError, ValueError):
            raise UserError(f"{flag(name)} {_shown(value)} is not allowed; allowed: {what}") from None


def flag(name: str, value: Any = True) -> str:
    """An argument as on the command line: `--num-layers 4`."""
    word = f"--{name.replace('_', '-')}"
    return word if value is True else f"{word} {_shown(value)}"


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def layer_pattern(value: Any, layers: int) -> list[bool]:
    """Which layers have experts, by `--moe-layer-freq`: every n-th, or a pattern such as `([0]*3+[1]*58)`.

    Raises UserError for a text that is neither.
    """
    if isinstance(value, int):
        return [layer % value == 0 for layer in range(layers)]
    text = re.sub(r"\s", "", str(value))
    if isinstance(value, list):
        pattern = [bool(item) for item in value]
    else:
        bare = text[1:-1] if text.startswith("(") and text.endswith(")") else text
        terms = [re.fullmatch(r"\(*\[([01](?:,[01])*)\](?:\*(\d{1,5}))?\)*", term) for term in bare.split("+")]
        if not all(terms):
            raise UserError(f"--moe-layer-freq {value}: allowed are a number, or a sum such as [0]*3+[1]*58")
        pattern = [item == "1" for term in terms for item in term[1].split(",") * int(term[2] or 1)]
    if len(pattern) != layers:
        raise UserError(f"--moe-layer-freq {value} is a pattern of {len(pattern)} layers, --num-layers is {layers}")
    return pattern
