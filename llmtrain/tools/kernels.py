"""`llmtrain kernels`: which implementation every op would use here, why the others would not serve, and how fast and exact they are."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, fields, replace

from llmtrain.config.arguments import parse_run_arguments
from llmtrain.config.run import RunConfig
from llmtrain.device import Device, select
from llmtrain.device.dtypes import DTYPES, torch_dtype
from llmtrain.errors import UserError
from llmtrain.ops import Call, KernelUnavailable, choose, implementations, op_names
from llmtrain.tools.kernels_bench import ERROR_TOKENS, Row, bench
from llmtrain.tools.kernels_shape import MAKERS, Shape, option, shape_of


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table for a device and dtype, or with --bench measure; returns 0, or 1 when some op has no implementation that serves."""
    args, overrides = _parser().parse_known_args(argv)
    _check(args, overrides)
    cfg = None if args.config is None else parse_run_arguments(["-c", args.config, *overrides], verb="kernels")[0].run
    device = select(args.device or (cfg.device if cfg else "auto"))
    args.dtype = args.dtype or (cfg.precision.compute if cfg else "fp32")
    call = _call(device, args, cfg)
    return _bench(device, call, Shape() if cfg is None else shape_of(cfg), args) if args.bench else _table(device, call, args)


def _table(device: Device, call: Call, args: argparse.Namespace) -> int:
    reason = device.unsupported_dtype(call.dtype)
    print(f"device: {device.describe()}\ncompute dtype: {args.dtype}{f' ({reason})' if reason else ''}\n")
    rows, missing = table(call)
    _print(rows)
    print("\nName one with kernels.OP=IMPLEMENTATION. A call that asks for more (head sizes, log-sum-exp) may be served by fewer.")
    for message in missing:
        print(message)
    return 1 if missing else 0


def table(call: Call) -> tuple[list[list[str]], list[str]]:
    """Rows of op, implementation, state, reason with a heading first; and one message per op that nothing serves."""
    rows, missing = [["op", "implementation", "state", "why"]], []
    for op in op_names():
        chosen, why = "", ""
        try:
            choice = choose(op, call)
            chosen, why = choice.name, choice.reason
        except KernelUnavailable as error:
            missing.append(str(error))
        for entry in implementations(op):
            refusal = entry.refusal(call)
            state = "chosen" if entry.name == chosen else "available" if refusal is None else "refused"
            rows.append([op, entry.name, state, why if state == "chosen" else refusal or ""])
    return rows, missing


def _bench(device: Device, call: Call, shape: Shape, args: argparse.Namespace) -> int:
    given = {field.name: getattr(args, field.name) for field in fields(Shape) if getattr(args, field.name) is not None}
    shape = replace(shape, **given).complete()
    if reason := device.unsupported_dtype(call.dtype):
        raise UserError(f"--dtype {args.dtype}: {reason}")
    ops = list(MAKERS) if args.op == "all" else [args.op]
    rows = bench(ops, shape, replace(call, backward=not args.forward), device=device, rounds=args.rounds)
    if args.json:
        found = [row.public() for row in rows]
        print(json.dumps({"device": device.describe(), "dtype": args.dtype, "rounds": args.rounds, "shape": asdict(shape), "rows": found}))
        return 0
    print(f"device: {device.describe()}\ncompute dtype: {args.dtype}\nshape: {_words(shape)}\n")
    _print([["op", "implementation", "state", "forward ms", "backward ms", "TFLOP/s", "error", "of gradients", "why"], *map(_cells, rows)])
    tokens = min(ERROR_TOKENS, shape.seq_len)
    print(
        f"\nTimes: medians of {args.rounds} rounds in which all take turns. TFLOP/s: of the forward pass, hidden pairs not counted.\n"
        f"Errors: of the norm, against float64, in one row of {tokens} tokens and the heads of one key head. Name one with kernels.OP=NAME."
    )
    return 0


def _cells(row: Row) -> list[str]:
    times = ["" if seconds is None else f"{seconds * 1e3:.2f}" for seconds in (row.forward, row.backward)]
    rate = f"{row.flops / row.forward / 1e12:.3g}" if row.flops and row.forward else ""
    errors = ["" if error is None else f"{error:.1e}" for error in (row.error, row.gradient_error)]
    return [row.op, row.name, row.state, *times, rate, *errors, row.why]


def _words(shape: Shape) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in asdict(shape).items() if value)


def _print(rows: list[list[str]]) -> None:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, [*widths, 0])).rstrip())


def _call(device: Device, args: argparse.Namespace, cfg: RunConfig | None) -> Call:
    """What a run asks for, without a configuration no more than the options say."""
    facts = {"deterministic": args.deterministic, "return_lse": args.lse}
    if cfg is not None:
        from llmtrain.stages.session import op_call

        call = op_call(cfg, device)
        return replace(call, dtype=torch_dtype(args.dtype), **{name: True for name, value in facts.items() if value})
    wide = torch_dtype("fp64" if args.dtype == "fp64" else "fp32")
    return Call(device=device.kind, dtype=torch_dtype(args.dtype), capability=device.capability(), parameter_dtype=wide, **facts)


def _check(args: argparse.Namespace, overrides: list[str]) -> None:
    """Raise UserError for words that go with others that are not there."""
    if overrides and args.config is None:
        raise UserError(f"kernels {overrides[0]}: no such option; overrides of a configuration need -c FILE (llmtrain kernels -h)")
    words = [option(name) for name in ("forward", "json") if getattr(args, name)]
    words += [option(field.name) for field in fields(Shape) if getattr(args, field.name) is not None]
    if words and not args.bench:
        raise UserError(f"{words[0]} belongs to --bench")
    if args.bench and args.lse:
        raise UserError("--lse belongs to the table; --bench measures calls without a log-sum-exp")
    if args.rounds < 1:
        raise UserError(f"--rounds {args.rounds}: it is at least 1")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llmtrain kernels", description="Implementations of every op on this machine.", allow_abbrev=False
    )
    parser.add_argument("-c", "--config", metavar="FILE", help="take device, dtype and shapes from it; overrides may follow")
    parser.add_argument("--device", help="auto, cpu, cuda or npu")
    parser.add_argument("--dtype", choices=list(DTYPES), help="compute dtype; fp32 without a configuration")
    parser.add_argument("--deterministic", action="store_true", help="only deterministic implementations")
    parser.add_argument("--lse", action="store_true", help="attention that returns its log-sum-exp")
    group = parser.add_argument_group("measuring")
    group.add_argument("--bench", action="store_true", help="times, and errors against float64, of every implementation that serves")
    group.add_argument("--op", default="attention", help=f"all, or one of {', '.join(MAKERS)}")
    group.add_argument("--rounds", type=int, default=5, help="how often each is timed")
    group.add_argument("--forward", action="store_true", help="the forward pass alone")
    group.add_argument("--json", action="store_true", help="one JSON object")
    for field in fields(Shape):
        group.add_argument(option(field.name), type=int, metavar="N", help=f"{field.name.replace('_', ' ')}")
    return parser
