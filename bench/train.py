"""Training speed and memory against Hugging Face transformers, litgpt and torchtitan, on a CPU.

    make bench-train                                   # makes .bench-venv with the peers, then the whole comparison
    .bench-venv/bin/python bench/train.py --only us,titan --dtype bf16 --mode eager --rounds 3
    .bench-venv/bin/python bench/train.py --memory --out bench/results/train-memory-cpu.md
    .bench-venv/bin/python bench/train.py --profile --only us --dtype bf16

bench/README.md says what is compared and how. Rounds are interleaved and their order rotates; run it on an idle machine.
"""

import argparse
import os
import shlex
import sys
import time
from dataclasses import asdict, fields, replace
from pathlib import Path

from train_peers import memory, report, speed
from train_peers.pool import Process, WorkerError
from train_peers.shape import Shape

ROOT = Path(__file__).resolve().parent.parent
CONTENDERS = ("us", "hf", "litgpt", "titan", "litgpt-chunked", "titan-chunked")
RACE = "us,hf,litgpt,titan"
VOCABULARIES = (32_000, 153_376)
MEMORY_BATCH = 4


def chosen(text: str, allowed: tuple[str, ...], option: str) -> list[str]:
    """The comma-separated names of an option, checked."""
    names = text.split(",")
    wrong = [name for name in names if name not in allowed]
    if wrong:
        raise SystemExit(f"{option}: {wrong[0]!r} is not one of {', '.join(allowed)}")
    return names


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="interleaved rounds of each class (9)")
    parser.add_argument("--steps", type=int, default=2, help="steps of each contender in a round (2)")
    parser.add_argument("--warmup", type=int, default=2, help="steps after the first that are not timed (2)")
    parser.add_argument("--only", default=None, help=f"of {','.join(CONTENDERS)}; {RACE} for speed, all for memory")
    parser.add_argument("--dtype", default="fp32,bf16", help="fp32,bf16")
    parser.add_argument("--mode", default=None, help="eager,compile for speed; eager for memory and profile")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="threads of each contender (all cores)")
    parser.add_argument("--memory", action="store_true", help="peak memory at vocabularies of 32,000 and 153,376 instead of speed")
    parser.add_argument("--profile", action="store_true", help="print where a step's time goes instead")
    parser.add_argument("--rows", type=int, default=25, help="ops in the profile (25)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="option of llmtrain, e.g. train.loss_chunk=256")
    parser.add_argument("--compile-cache", type=Path, help="keep compiled code here; by default every start compiles anew")
    parser.add_argument("--out", type=Path, help="markdown file; bench/results/train-cpu.md or train-memory-cpu.md")
    for field in fields(Shape):
        parser.add_argument(f"--{field.name}", type=int, help=f"of the shape ({field.default})")
    args = parser.parse_args()
    if min(args.rounds, args.steps, args.warmup, args.threads) < 1:
        raise SystemExit("--rounds, --steps, --warmup and --threads must be at least 1")
    everything = ",".join(CONTENDERS)
    args.names = chosen(args.only or (everything if args.memory else "us" if args.profile else RACE), CONTENDERS, "--only")
    args.dtypes = chosen(args.dtype, ("fp32", "bf16"), "--dtype")
    args.modes = chosen(args.mode or ("eager" if args.memory or args.profile else "eager,compile"), ("eager", "compile"), "--mode")
    wrong = [text for text in args.set if "=" not in text]
    if wrong:
        raise SystemExit(f"--set {wrong[0]}: give KEY=VALUE, e.g. train.loss_chunk=256")
    args.overrides = [f"--{text}" for text in args.set]
    args.shape = replace(Shape(), **{f.name: getattr(args, f.name) for f in fields(Shape) if getattr(args, f.name) is not None})
    return args


def write(path: Path, text: str) -> None:
    """Write the result so far."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def run_speed(args: argparse.Namespace) -> int:
    """Every class in turn; the file is written after each, so that an interrupted run leaves what it has."""
    out = args.out or ROOT / "bench/results/train-cpu.md"
    tables, failed, started = [], False, time.perf_counter()
    classes = [(dtype, mode) for dtype in args.dtypes for mode in args.modes]
    for index, (dtype, mode) in enumerate(classes):
        print(f"{dtype} {mode} (class {index + 1} of {len(classes)})", flush=True)
        result = speed.measure(args.names, args.shape, dtype=dtype, mode=mode, options=args)
        failed |= bool(result.failed)
        tables.append(report.speed_table(result, args.shape))
        print(tables[-1], flush=True)
        title = f"Training speed: {args.shape.parameters / 1e6:.1f} M parameters, vocabulary {args.shape.vocab:,}"
        head = report.heading(title, args.shape, command=command(), threads=args.threads)
        write(out, f"{head}\n{report.FLOPS}\n{''.join(tables)}")
        spent = time.perf_counter() - started
        print(
            f"{spent / 60:.0f} minutes so far, about {spent / (index + 1) * (len(classes) - index - 1) / 60:.0f} left; in {out}\n",
            flush=True,
        )
    return 1 if failed else 0


def run_memory(args: argparse.Namespace) -> int:
    """Every contender at every vocabulary and number format, one process at a time."""
    out = args.out or ROOT / "bench/results/train-memory-cpu.md"
    results, failed = [], {}
    shape = args.shape if args.batch else replace(args.shape, batch=MEMORY_BATCH)
    shapes = [shape] if args.vocab else [replace(shape, vocab=vocab) for vocab in VOCABULARIES]
    jobs = [(shape, dtype, mode, name) for shape in shapes for dtype in args.dtypes for mode in args.modes for name in args.names]
    for index, (shape, dtype, mode, name) in enumerate(jobs):
        label = f"{name} {dtype} {mode}, vocabulary {shape.vocab:,}"
        try:
            results.append(memory.measure(name, shape, dtype=dtype, compiled=mode == "compile", options=args))
            print(f"{index + 1}/{len(jobs)} {label}: {results[-1].above / 2**20:,.0f} MiB above imports and state", flush=True)
        except WorkerError as error:
            failed[label] = error.reason
            print(f"{index + 1}/{len(jobs)} FAILED {label}: {error}", flush=True)
        head = report.heading("Training memory", shape, command=command(), threads=args.threads)
        write(out, head + report.memory_table(results, failed))
    print(out.read_text())
    return 1 if failed else 0


def run_profile(args: argparse.Namespace) -> int:
    """Print the costliest ops of one step, and the share of each kind of work."""
    for name in args.names:
        for dtype, mode in ((dtype, mode) for dtype in args.dtypes for mode in args.modes):
            with Process(name, threads=args.threads, compile_cache=args.compile_cache, profiled=True) as worker:
                worker.ask("build", name=name, shape=asdict(args.shape), dtype=dtype, compiled=mode == "compile", overrides=args.overrides)
                worker.ask("steps", count=1 + args.warmup)
                plain = min(worker.ask("steps", count=args.steps)["seconds"])
                found, gemm = worker.ask("profile", rows=args.rows), worker.ask("gemm")[dtype]
            rate = args.shape.flops / plain / 1e9
            print(
                f"\n## {name} {dtype} {mode}: {plain * 1e3:,.0f} ms a step, {rate:.0f} GFLOP/s, {rate / gemm:.0%} of GEMM at {gemm:.0f}\n"
            )
            print(found["text"])
            print("\n" + ", ".join(f"{kind} {share:.1%}" for kind, share in sorted(found["shares"].items(), key=lambda item: -item[1])))
    return 0


def command() -> str:
    """The command as it was given."""
    return "python bench/train.py " + shlex.join(sys.argv[1:])


def main() -> int:
    """Measure what was asked for; 1 if a contender failed."""
    args = arguments()
    return run_memory(args) if args.memory else run_profile(args) if args.profile else run_speed(args)


if __name__ == "__main__":
    sys.exit(main())
