"""`llmtrain config`: what a run's configuration is, where each value came from, and what may be set."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmtrain.config.arguments import parse_run_arguments
from llmtrain.config.errors import ConfigError
from llmtrain.config.helptext import options_help
from llmtrain.config.layer import Path as Path_
from llmtrain.config.layer import dotted
from llmtrain.config.load import LoadedConfig, leaves, load, schema
from llmtrain.config.mesh_dependent import mesh_dependent
from llmtrain.config.model import ModelConfig
from llmtrain.config.parameters import count_parameters, worth_saying
from llmtrain.config.published import PRESETS
from llmtrain.config.run import RunConfig
from llmtrain.config.yamlfile import inline
from llmtrain.convert.megatron_yaml import translate

USAGE = """usage: llmtrain config show -c FILE [--section.key VALUE ...]   every value, where it came from, parameters by part
       llmtrain config show --presets                           the published models
       llmtrain config diff A B                                 what differs between two YAML files or run folders
       llmtrain config schema                                   JSON Schema, for completion in editors
       llmtrain config help [SECTION]                           every option with its documentation
       llmtrain config from-megatron WORDS ...                  arguments of Megatron-LM or MindSpeed-LLM as YAML"""


def main(argv: list[str]) -> int:
    """Run `llmtrain config ARGV`; returns 0. Raises ConfigError for what the user can correct."""
    actions = {"show": show, "diff": diff, "schema": print_schema, "help": print_help, "from-megatron": from_megatron}
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    if argv[0] not in actions:
        raise ConfigError(f"config {argv[0]}: no such action; allowed: {', '.join(actions)}")
    if "-h" in argv or "--help" in argv:
        print(USAGE)
        return 0
    actions[argv[0]](argv[1:])
    return 0


def show(argv: list[str]) -> None:
    """Print the resolved configuration as YAML with an origin per line, then the parameters."""
    if argv == ["--presets"]:
        print(presets())
        return
    loaded, _ = parse_run_arguments(argv, verb="config show")
    print(annotated(loaded))
    print()
    print(parameter_table(loaded.run.model))


def annotated(loaded: LoadedConfig) -> str:
    """The run as YAML that `load` reads back, each line with its origin and what makes it depend on the mesh."""
    reasons = mesh_dependent(loaded.run)

    def note(path: Path_) -> str:
        origin, reason = loaded.origin.get(dotted(path), ""), reasons.get(dotted(path))
        return f"{origin}; mesh-dependent: {reason}" if reason else origin

    rows = [(text, note(path)) for text, path in _rows(loaded.run.model_dump(mode="json"), (), "")]
    width = min(60, max(len(text) for text, _ in rows))
    return "\n".join(f"{text:{width}s}  # {origin}" if origin else text for text, origin in rows)


def _rows(values: dict[str, Any], path: Path_, indent: str) -> Iterator[tuple[str, Path_]]:
    """Lines of block YAML, each with the path whose value stands on it."""
    for key, value in values.items():
        here, start = (*path, key), f"{indent}{inline(key)}:"
        if isinstance(value, dict) and value:
            yield start, ()
            yield from _rows(value, here, indent + "  ")
        elif isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
            yield start, ()
            for index, item in enumerate(value):
                (first, where), *others = _rows(item, (*here, index), indent + "    ")
                yield f"{indent}  - {first.lstrip()}", where
                yield from others
        else:
            yield f"{start} {inline(value)}", here


def parameter_table(model: ModelConfig) -> str:
    """Parameters by part."""
    if model.vocab_size is None:
        return "parameters: unknown until model.vocab_size is; it is read from the tokenizer when the run starts"
    counts = worth_saying(count_parameters(model))
    return "\n".join(["parameters", *(f"  {part:20s} {count:>18,}" for part, count in counts.items())])


def presets() -> str:
    """One line per published model."""
    lines = ["model: {preset: NAME}"]
    for name in PRESETS:
        model = ModelConfig(preset=name)
        counts = count_parameters(model)
        shape = f"{model.layers} layers, width {model.hidden:,}, vocabulary {model.vocab_size:,}, context {model.max_seq_len:,}"
        active = f", {counts['active'] / 1e9:.3f} B active" if model.ffn.kind == "moe" else ""
        lines.append(f"  {name:20s} {counts['total'] / 1e9:8.3f} B  {shape}{active}")
    return "\n".join(lines)


def diff(argv: list[str]) -> None:
    """Print the options whose values differ between two configurations."""
    if len(argv) != 2:
        raise ConfigError("config diff takes two YAML files or run folders: llmtrain config diff A B")
    a, b = (_load_any(Path(name)) for name in argv)
    rows = differences(a.run, b.run)
    print("\n".join(f"{name}: {old} -> {new}" for name, old, new in rows) or "no difference")


def differences(a: RunConfig, b: RunConfig) -> list[tuple[str, str, str]]:
    """(dotted path, value in `a`, value in `b`) of what differs; `absent` where one has no such entry."""
    left, right = ({dotted(p): inline(v) for p, v in leaves(run.model_dump(mode="json"))} for run in (a, b))
    names = dict.fromkeys([*left, *right])
    return [(n, left.get(n, "absent"), right.get(n, "absent")) for n in names if left.get(n) != right.get(n)]


def _load_any(path: Path) -> LoadedConfig:
    return load(path / "config.yaml" if path.is_dir() else path, [])


def from_megatron(argv: list[str]) -> None:
    """Print the YAML that does what these arguments of Megatron-LM or MindSpeed-LLM do; on stderr, what needs no option here.

    Raises ConfigError, after the YAML, if it is none that a run accepts.
    """
    found = translate(argv)
    print(found.text())
    for word, reason in found.unneeded.items():
        print(f"needs no option: {word} ({reason})", file=sys.stderr)
    RunConfig.load(found.values)


def print_schema(argv: list[str]) -> None:
    """Print the JSON Schema."""
    if argv:
        raise ConfigError(f"config schema takes no {argv[0]!r}")
    print(json.dumps(schema(), indent=2))


def print_help(argv: list[str]) -> None:
    """Print the documentation of all options, or of one section."""
    if len(argv) > 1:
        raise ConfigError(f"config help takes one section, not {' '.join(argv)}")
    print(options_help(argv[0] if argv else None))
