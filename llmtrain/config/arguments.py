"""The words after a stage's verb: `-c FILE`, `--dry-run`, `-h`, and overrides of any option."""

from dataclasses import dataclass

from llmtrain.config.errors import ConfigError
from llmtrain.config.load import LoadedConfig, load, named_plugins, read
from llmtrain.plugins import load_plugins

USAGE = """usage: llmtrain {verb} -c FILE [--dry-run] [--section.key VALUE ...]

{description}

  -c, --config FILE   YAML file; it may name others with `extends:`
  --dry-run           resolve, count parameters and memory, build the mesh's ranks without memory, try a step of a miniature, and exit
  -h, --help          this text; `llmtrain config help SECTION` prints one section

Any option below may follow, over what the file says: --train.steps 200, --train.steps=200, --metrics.tensorboard,
--no-checkpoint.asynchronous, --train.phases.0.seq_len 8192. --resume X is short for --checkpoint.resume X.

"""


@dataclass(frozen=True)
class RunOptions:
    """What a stage is asked beside its configuration."""

    config: str | None
    dry_run: bool = False


def parse_run_arguments(argv: list[str], *, verb: str = "train", description: str = "") -> tuple[LoadedConfig, RunOptions]:
    """The configuration and the options that the words after a verb give; `-h` prints help and exits with 0.

    Raises:
        ConfigError: nothing given, or anything `load` refuses.
    """
    if "-h" in argv or "--help" in argv:
        load_plugins(plugin_names(argv))
        _print_help(verb, description)
    options, rest = _split(argv)
    if options.config is None and not rest:
        raise ConfigError(f"nothing to run: give a configuration, llmtrain {verb} -c FILE (llmtrain {verb} -h for help)")
    return load(options.config, rest), options


def plugin_names(argv: list[str]) -> list[str]:
    """`plugins` as the words after a verb give it, in a file or on the command line. Raises ConfigError as `parse_run_arguments`."""
    options, rest = _split([word for word in argv if word not in ("-h", "--help")])
    return named_plugins(read(options.config), rest)


def _split(argv: list[str]) -> tuple[RunOptions, list[str]]:
    """The stage's own options, and the words that are overrides."""
    file, dry_run, rest = None, False, []
    words = iter(argv)
    for word in words:
        name, equals, value = word.partition("=")
        if name in ("-c", "--config"):
            if file is not None:
                raise ConfigError(f"{name} is given twice; a file may name others with `extends:`")
            file = value if equals else next(words, None)
            if not file or file.startswith("--"):
                raise ConfigError(f"{name} needs a YAML file")
        elif word == "--dry-run":
            dry_run = True
        elif not word.startswith("-") and word.endswith((".yaml", ".yml")) and not _is_value(rest):
            raise ConfigError(f"{word!r} on the command line is no option; did you mean -c {word}?")
        else:
            rest.append(word)
    return RunOptions(file, dry_run), rest


def _is_value(before: list[str]) -> bool:
    return bool(before) and before[-1].startswith("--") and "=" not in before[-1]


def _print_help(verb: str, description: str) -> None:
    from llmtrain.config.helptext import options_help

    print(USAGE.format(verb=verb, description=description or f"Run the stage {verb!r}.") + options_help())
    raise SystemExit(0)
