"""Commands as documentation shows them: their words, and whether the verb would understand these."""

import shlex
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]


def words_of(command: str) -> list[str] | None:
    """The words after `llmtrain` of a command, None if it starts something else."""
    words = shlex.split(command)
    if words[0] == "torchrun":
        return words[words.index("llmtrain") + 1 :]
    words = words[1:] if words[0] == "srun" else words
    return words[1:] if words[0].removeprefix(".venv/bin/") == "llmtrain" else None


def understand(command: str) -> None:
    """Parse a command of llmtrain as its verb would. Raises SystemExit or UserError if it cannot."""
    verb, *words = words_of(command)
    words = shlex.split(" ".join(map(shlex.quote, words)).split("'>'")[0])  # without a redirection
    parse = PARSERS.get(verb)
    assert parse is not None, f"{verb}: no test knows how it reads its words"
    parse([str(ROOT / word) if word.startswith(("configs/", "examples/")) else word for word in words])


def _run(words: list[str]) -> None:
    from llmtrain.config.arguments import parse_run_arguments

    model = [
        "--model.pretrained",
        "null",
        "--model.preset",
        "smollm2_135m",
    ]  # where a command starts from a folder that it takes to be there
    parse_run_arguments(words + model * any(word.endswith("smollm2_sft.yaml") for word in words))


def _config(words: list[str]) -> None:
    from llmtrain.config.helptext import options_help
    from llmtrain.config.load import load

    action, *rest = words
    if action == "show":
        _run([word for word in rest if word != "--presets"])
    elif action == "help":
        assert all(options_help(section) for section in rest)
    elif action == "from-megatron":
        from llmtrain.convert.megatron_yaml import translate

        assert translate(rest).text()
    else:
        assert (action, len(rest)) in (("schema", 0), ("diff", 2)), words
        [load(Path(file), []) for file in rest if Path(file).exists()]


def _gap(words: list[str]) -> None:
    """The file is the user's own; `-c` and overrides are the words of every stage."""
    from llmtrain.config.arguments import _split

    options, _ = _split(words)
    assert options.config, words


def _eval(words: list[str]) -> None:
    from llmtrain.tools import evaluate, evaluate_files

    (evaluate_files if words[0] in evaluate_files.VERBS else evaluate)._parse(words)


def _compare(words: list[str]) -> None:
    from llmtrain.config.load import load
    from llmtrain.tools.compare.side import as_options
    from llmtrain.tools.compare.verb import parse

    options, overrides = parse(words)
    if getattr(options, "config", Path()).is_file():
        for side in (getattr(options, "a", ""), getattr(options, "b", "")):
            load(options.config, [*overrides, *as_options(side)])


def _launch(words: list[str]) -> None:
    from llmtrain.tools.jobs.verb import parser

    options, overrides = parser().parse_known_args(words)
    _run(["-c", options.config, *overrides])


def _plan(words: list[str]) -> None:
    """A part of the planner has a parser of its own; what is left over are options of a run."""
    import importlib

    from llmtrain.hardware import load
    from llmtrain.tools.plan import verb

    part = words[0] if words[0] in verb.PARTS else None
    if part in ("papers", "calibrate", "errors"):
        if part != "papers":
            importlib.import_module(verb.PARTS[part]).parser().parse_args(words[1:])
        return
    parser = importlib.import_module(verb.PARTS[part]).parser() if part else verb.parser()
    options, overrides = parser.parse_known_args(words[1:] if part else words)
    load(options.hardware)
    _run(["-c", options.config, *overrides])


def _plain(module: str, name: str) -> Callable[[list[str]], None]:
    """A verb without options of a run: `name` of its module is a parser, or what parses."""

    def parse(words: list[str]) -> None:
        import importlib

        found = getattr(importlib.import_module(module), name)
        found(words) if name == "_parse" else found().parse_args(words)

    return parse


PARSERS: dict[str, Callable[[list[str]], None]] = {
    "train": _run,
    "sft": _run,
    "metaladder": _run,
    "gap": _gap,
    "config": _config,
    "compare": _compare,
    "launch": _launch,
    "data": _plain("llmtrain.tools.data", "parser"),
    "generate": _plain("llmtrain.tools.generate", "_parse"),
    "eval": _eval,
    "convert": _plain("llmtrain.tools.convert", "parser"),
    "kernels": _plain("llmtrain.tools.kernels", "_parser"),
    "doctor": _plain("llmtrain.tools.doctor.command", "_parser"),
    "selftest": _plain("llmtrain.tools.selftest.verb", "parser"),
    "plan": _plan,
    "report": _plain("llmtrain.tools.report", "parser"),
}
