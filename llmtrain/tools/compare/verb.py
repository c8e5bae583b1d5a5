"""`llmtrain compare`: the words after the verb."""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from llmtrain.errors import UserError

USAGE = """llmtrain compare -c FILE --a "WORDS" --b "WORDS" [--section.key VALUE ...]
       llmtrain compare record -c FILE --out SIDE.safetensors [--section.key VALUE ...]
       llmtrain compare A.safetensors B.safetensors"""
DESCRIPTION = """Run the same training step (same weights, same batch, one rank) with two devices, kernels, formats or engines, and show
layer by layer how far activations and gradients are from each other and from float64, and where they first part by more than rounding
explains. WORDS are overrides: "device=npu kernels.attention=auto". On two machines: record a side on each, then compare the files."""
WITHIN, PARTED = 0, 1


def main(argv: Sequence[str] | None = None) -> int:
    """Compare; returns 0 if the sides are within their bounds everywhere and 1 if they part (or after a user error)."""
    options, overrides = parse(list(sys.argv[1:] if argv is None else argv))
    return options.act(options, overrides)


def parse(words: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The words after `compare`: options, among them `act(options, overrides)` that does the work, and overrides of the configuration."""
    if words[:1] == ["record"]:
        return _recording().parse_known_args(words[1:])
    files = [word for word in words if not word.startswith("-") and word.endswith(".safetensors")]
    return (_files().parse_args(words), []) if files else _here().parse_known_args(words)


def _files() -> argparse.ArgumentParser:
    parser = _parser()
    parser.add_argument("files", nargs=2, type=Path, metavar="SIDE.safetensors", help="what `llmtrain compare record` wrote")
    _add_output(parser)
    parser.set_defaults(act=_compare_files)
    return parser


def _here() -> argparse.ArgumentParser:
    parser = _parser()
    parser.add_argument("--a", default="", metavar="WORDS", help="overrides that make side A (none: as the file says)")
    parser.add_argument("--b", default="", metavar="WORDS", help="overrides that make side B")
    _add_step(parser)
    _add_output(parser)
    parser.set_defaults(act=_compare_here)
    return parser


def _recording() -> argparse.ArgumentParser:
    parser = _parser(" record")
    parser.add_argument("--out", type=Path, required=True, metavar="SIDE.safetensors", help="file to write")
    _add_step(parser)
    parser.set_defaults(act=_record)
    return parser


def _compare_files(options: argparse.Namespace, _: list[str]) -> int:
    from llmtrain.tools.compare.trace import load_trace

    return _show(*(load_trace(path) for path in options.files), options)


def _compare_here(options: argparse.Namespace, overrides: list[str]) -> int:
    if options.a.split() == options.b.split():
        raise UserError('A and B are the same: give --a and --b, such as --a "device=cpu" --b "device=npu"')
    from llmtrain.tools.compare.side import read_side

    chosen = {"step": options.step, "rows": options.rows}
    sides = [read_side(options.config, overrides, given, **chosen) for given in (options.a, options.b)]
    return _show(*_run(sides, options), options)


def _record(options: argparse.Namespace, overrides: list[str]) -> int:
    from llmtrain.tools.compare.side import read_side

    side = read_side(options.config, [], shlex.join(overrides), step=options.step, rows=options.rows)
    (trace,) = _run([side], options)
    trace.save(options.out)
    _say(f"{options.out}: {len(trace.points):,} places, {options.out.stat().st_size / 2**20:.1f} MiB, loss {trace.meta['loss']:.6f}")
    return WITHIN


def _run(sides: list, options: argparse.Namespace) -> list:
    """Record every side and, unless told otherwise, measure it against the reference; each needed run is made once."""
    from llmtrain.tools.compare import measure
    from llmtrain.tools.compare.side import measured_norms, run_side, with_norms

    exact = measure.on_cpu(sides[0], "fp64")
    if norms := measured_norms(exact):
        _say("measured in float64: " + ", ".join(f"norm.{name} {value:.4f}" for name, value in norms.items()))
    sides = [with_norms(side, norms) for side in sides]

    def run(side, what: str):
        _say(f"running {what}: {side.words or 'as configured'}")
        return run_side(side, limit=options.sample)

    traces = [run(side, f"side {name}" if len(sides) > 1 else "the step") for name, side in zip("AB", sides)]
    if not options.no_reference:
        reference = run(measure.on_cpu(sides[0], "fp64"), "the reference")
        controls = {side.cfg.precision.compute: side for side in sides}
        runs = {compute: run(measure.on_cpu(side, compute), "the control") for compute, side in controls.items()}
        for side, trace in zip(sides, traces):
            measure.measure(trace, reference=reference, control=runs[side.cfg.precision.compute])
    return traces


def _show(a, b, options: argparse.Namespace) -> int:
    from llmtrain.tools.compare.judge import compare
    from llmtrain.tools.compare.table import text, write_page

    found = compare(a, b)
    print(text(found, everything=options.all))
    if options.report:
        _say("written: " + ", ".join(map(str, write_page(found, options.report))))
    return PARTED if found.first else WITHIN


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _parser(more: str = "") -> argparse.ArgumentParser:
    return argparse.ArgumentParser(prog=f"llmtrain compare{more}", usage=USAGE, description=DESCRIPTION, allow_abbrev=False)


def _add_step(parser: argparse.ArgumentParser) -> None:
    from llmtrain.tools.compare.settings import LIMIT

    parser.add_argument("-c", "--config", type=Path, required=True, help="YAML file; or a run folder, at its newest checkpoint")
    parser.add_argument("--step", type=int, help="step of the run whose batch is taken (0; the one after a checkpoint)")
    parser.add_argument("--rows", type=int, help="sequences of that step, run as one micro-batch (train.micro_batch)")
    parser.add_argument("--sample", type=int, default=LIMIT, help=f"values kept of a tensor, 0 for all ({LIMIT:,})")
    parser.add_argument("--no-reference", action="store_true", help="no runs in float64 and of the control: for models beyond the CPU")


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--all", action="store_true", help="print every place, not only whole blocks and where the sides part")
    parser.add_argument("--report", type=Path, metavar="FILE.md", help="write the whole table and a plot")
