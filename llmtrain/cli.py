"""The command line: verbs, and nothing else. A verb's module is imported when it is used, so help needs no torch."""

import difflib
import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from llmtrain import __version__
from llmtrain.errors import UserError

DONE, USER_ERROR, INTERRUPTED = 0, 1, 130


@dataclass(frozen=True)
class Verb:
    """A function `(argv) -> exit code` in a module, and its line of help."""

    module: str
    help: str
    function: str = "main"


STAGE = "llmtrain.stages.registry"
"""Its `main` takes the verb, too: the module of the stage, and torch with it, are imported when the words have been read."""
VERBS = {
    "train": Verb("llmtrain.stages.pretrain", "pretrain a model as a YAML file says"),
    "sft": Verb("llmtrain.stages.sft", "fine-tune a pretrained model on the answers of conversations"),
    "gap": Verb(STAGE, "Gradient Ascent Post-training: a few steps up the loss of one text, many texts, measured"),
    "metaladder": Verb(STAGE, "train on problems with analogous ones, self-evolve, and check the answers"),
    "generate": Verb("llmtrain.tools.generate", "continue a prompt with a trained model"),
    "convert": Verb("llmtrain.tools.convert", "read and write Hugging Face folders, read GGUF and Megatron checkpoints; compare"),
    "eval": Verb("llmtrain.tools.evaluate", "perplexity, dialogue, needle, RoPE base, lm-eval tasks, problems; compare; error rates"),
    "data": Verb("llmtrain.tools.data", "train a tokenizer, tokenise text, look at tokens and conversations; MetaLadder's problems"),
    "config": Verb("llmtrain.tools.config", "show, compare and explain configurations; list the published models"),
    "kernels": Verb("llmtrain.tools.kernels", "which implementation each op uses on this machine, and why"),
    "plan": Verb("llmtrain.tools.plan.verb", "time, memory and the best mesh of a run before it runs; errors against published rows"),
    "compare": Verb("llmtrain.tools.compare.verb", "one step on two devices, kernels or engines, layer by layer: where the numbers part"),
    "doctor": Verb("llmtrain.tools.doctor.command", "check this machine: versions that fit, drivers, packages, collectives, memory, links"),
    "selftest": Verb("llmtrain.tools.selftest.verb", "parity, kernel errors, speed and doctor of this machine in one file to send back"),
    "launch": Verb("llmtrain.tools.jobs.verb", "write the job file that starts a run on a cluster: torchrun, Slurm, Kubernetes"),
    "report": Verb("llmtrain.tools.report", "write report.md of a run folder"),
}

FOOTER = """
Exit codes: 0 done, 1 something to correct, 2 stopped by a signal after saving, 3 stopped by a guard.
LLMTRAIN_TRACEBACK=1 shows the traceback of an error. `llmtrain VERB -h` explains a verb."""


def main(argv: list[str] | None = None) -> int:
    """Run the verb that `argv` (default: the process's arguments) names and return the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage())
        return DONE if words else USER_ERROR
    if words[0] in ("-V", "--version"):
        print(f"llmtrain {__version__}")
        return DONE
    return _run(words[0], words[1:])


def usage() -> str:
    """The text of `llmtrain --help`."""
    lines = [f"  {name:10s} {verb.help}" for name, verb in VERBS.items()]
    return "usage: llmtrain VERB ...\n\n" + "\n".join(lines) + "\n" + FOOTER


def _find(name: str, argv: list[str]) -> Callable[[list[str]], int]:
    """The function of a verb, which may be a plugin's stage. Raises UserError if there is none."""
    if name in VERBS:
        verb = VERBS[name]
        found = getattr(importlib.import_module(verb.module), verb.function)
        return partial(found, name) if verb.module == STAGE else found
    from llmtrain.stages.registry import find_verb, stages

    found = None if name.startswith("-") else find_verb(name, argv)
    if found is None:
        known = [*VERBS, *(stage for stage in stages() if stage not in VERBS)]
        near = difflib.get_close_matches(name, known, 1, 0.5)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"{name!r} is no verb; allowed: {', '.join(known)}{hint}")
    return found


def _run(name: str, argv: list[str]) -> int:
    try:
        return _find(name, argv)(argv)
    except SystemExit as stop:
        return _exit_code(stop)
    except KeyboardInterrupt:
        print("llmtrain: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader of a pipe has left; nothing to flush at exit
        return DONE
    except Exception as error:
        if os.environ.get("LLMTRAIN_TRACEBACK", "0") != "0" or not is_user_error(error):
            _explain_after(error)
            raise
        print(f"llmtrain: {_words(error)}", file=sys.stderr)
        return USER_ERROR


def _explain_after(error: Exception) -> None:
    """Have what is known of `error` printed below its traceback, should nobody catch it."""
    from llmtrain.hardware.messages import explain_error

    text, show = explain_error(error), sys.excepthook
    if text is None:
        return

    def hook(kind: type, value: BaseException, trace: object) -> None:
        show(kind, value, trace)
        if value is error:
            print(f"\n{text}", file=sys.stderr, flush=True)

    sys.excepthook = hook


def is_user_error(error: Exception) -> bool:
    """Whether `error` is for the user to correct, so that a traceback would only be in the way."""
    data_error = getattr(sys.modules.get("llmtrain.data.errors"), "DataError", UserError)
    path_error = isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError | NotADirectoryError) and error.filename
    return isinstance(error, UserError | data_error) or bool(path_error)


def _words(error: Exception) -> str:
    return f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else str(error)


def _exit_code(stop: SystemExit) -> int:
    """argparse leaves with 2 for wrong words, which here means stopped after saving; a text is a message."""
    if isinstance(stop.code, str):
        print(f"llmtrain: {stop.code}", file=sys.stderr)
        return USER_ERROR
    return USER_ERROR if stop.code == 2 else int(stop.code or 0)
