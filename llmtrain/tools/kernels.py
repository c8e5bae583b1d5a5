"""`llmtrain kernels`: which implementation every op would use here, and why the others would not serve."""

import argparse
from collections.abc import Sequence

from llmtrain.device import Device, select
from llmtrain.device.dtypes import DTYPES, torch_dtype
from llmtrain.ops import Call, KernelUnavailable, choose, implementations, op_names


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table for a device and dtype; returns 0, or 1 when some op has no implementation that serves."""
    args = _parser().parse_args(argv)
    device = select(args.device)
    reason = device.unsupported_dtype(torch_dtype(args.dtype))
    print(f"device: {device.describe()}\ncompute dtype: {args.dtype}{f' ({reason})' if reason else ''}\n")
    rows, missing = table(device, _call(device, args))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, [*widths, 0])).rstrip())
    print("\nName one with kernels.OP=IMPLEMENTATION. A call that asks for more (head sizes, log-sum-exp) may be served by fewer.")
    for message in missing:
        print(message)
    return 1 if missing else 0


def table(device: Device, call: Call) -> tuple[list[list[str]], list[str]]:
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


def _call(device: Device, args: argparse.Namespace) -> Call:
    return Call(
        device=device.kind,
        dtype=torch_dtype(args.dtype),
        capability=device.capability(),
        parameter_dtype=torch_dtype("fp64" if args.dtype == "fp64" else "fp32"),
        deterministic=args.deterministic,
        return_lse=args.lse,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="llmtrain kernels", description="Implementations of every op on this machine.")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or npu")
    parser.add_argument("--dtype", default="fp32", choices=list(DTYPES), help="compute dtype")
    parser.add_argument("--deterministic", action="store_true", help="only deterministic implementations")
    parser.add_argument("--lse", action="store_true", help="attention that returns its log-sum-exp")
    return parser
