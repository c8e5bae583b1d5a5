"""A command line of Megatron-LM or MindSpeed-LLM as a configuration of ours, with what it says that ours cannot. Needs no torch."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from llmtrain.config.yamlfile import dump
from llmtrain.convert.megatron_arguments import Given, flag, read_words
from llmtrain.convert.megatron_known import needs_nothing
from llmtrain.convert.megatron_model import model_values
from llmtrain.convert.megatron_run import run_values


@dataclass
class Translation:
    """What became of the arguments."""

    values: dict[str, Any]
    """Sections of a run, as plain values."""
    differing: list[str] = field(default_factory=list)
    """Sentences about what is or is computed differently here."""
    unknown: list[str] = field(default_factory=list)
    """Arguments without a counterpart, as they were given."""
    unneeded: dict[str, str] = field(default_factory=dict)
    """Arguments that need no option, with the reason."""

    def text(self) -> str:
        """The configuration as YAML, what is to be known of it first, as comments."""
        lines = ["# From arguments of Megatron-LM or MindSpeed-LLM, by `llmtrain config from-megatron`."]
        for title, sentences in (("differs", self.differing), ("has no counterpart", self.unknown)):
            lines += [f"# {title}: {sentence}" for sentence in sentences]
        return "\n".join([*lines, dump(self.values)])


def translate(words: Sequence[str]) -> Translation:
    """Translate the words of a command line; raises UserError for words that make no sense."""
    given = Given(read_words(words))
    found = Translation({})
    say = found.differing.append
    model = model_values(given, say)
    found.values = run_values(given, say) | {"model": model}
    found.values = {key: found.values[key] for key in _ORDER if key in found.values}
    for name in given.values:
        if name in given.used:
            continue
        reason = needs_nothing(name)
        if reason is None:
            found.unknown.append(flag(name, given.values[name]))
        else:
            found.unneeded[flag(name, given.values[name])] = reason
    return found


_ORDER = (
    *(
        "name",
        "output",
        "seed",
        "model",
        "tokenizer",
        "data",
        "optim",
        "schedule",
        "train",
        "parallel",
        "precision",
        "checkpoint",
        "metrics",
    ),
)
