"""Time and peak memory of cross-entropy fused with the head, forward and backward, on the CPU.

    python bench/cross_entropy.py                    # every case, each in a process of its own, as a Markdown table
    python bench/cross_entropy.py --rows 2048 --width 256 --vocab 32000 --chunk 256 --chunk 1024

Peak memory is the growth of the resident set's high-water mark over what the inputs take; the weight's gradient (V x D) is part of it.
Linux only (VmHWM).
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time

import torch
import torch.nn.functional as F

from llmtrain.device import select
from llmtrain.ops.cross_entropy import cross_entropy_chunked, cross_entropy_reference

CASES = ((4096, 256, 2048), (32000, 512, 2048), (153376, 256, 2048))  # V, D, N


def methods(chunks: list[int]) -> dict[str, object]:
    """Name -> loss function of (hidden, weight, targets)."""
    found = {"full logits (reference)": lambda h, w, t: cross_entropy_reference(h, w, t)}
    for chunk in chunks:
        found[f"chunked, {chunk} rows"] = lambda h, w, t, chunk=chunk: cross_entropy_chunked(h, w, t, chunk=chunk)
    if hasattr(F, "linear_cross_entropy") and hasattr(torch.nn, "LinearCrossEntropyOptions"):
        options = torch.nn.LinearCrossEntropyOptions()
        found["torch linear_cross_entropy"] = lambda h, w, t: F.linear_cross_entropy(h, w, t, reduction="sum", options=options)
    return found


def measure(args: argparse.Namespace) -> dict[str, float]:
    """Median seconds and peak bytes of one method in this process."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    dtype = getattr(torch, args.dtype)
    hidden = torch.randn(args.rows, args.width).to(dtype).requires_grad_()
    weight = (torch.randn(args.vocab, args.width) * args.width**-0.5).to(dtype).requires_grad_()
    targets = torch.randint(0, args.vocab, (args.rows,))
    loss = methods(args.chunk)[args.method]
    device = select("cpu")
    device.reset_peak_memory()
    before = device.memory().allocated
    seconds = []
    for _ in range(args.repeat):
        hidden.grad = weight.grad = None
        start = time.perf_counter()
        value = loss(hidden, weight, targets) / args.rows
        value.backward()
        seconds.append(time.perf_counter() - start)
    return {"seconds": statistics.median(seconds), "peak": device.memory().peak - before, "loss": value.item()}


def main() -> None:
    """Print the table, or with --method measure it here and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("rows", 0), ("width", 0), ("vocab", 0), ("threads", torch.get_num_threads()), ("repeat", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--chunk", type=int, action="append")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--method")
    args = parser.parse_args()
    args.chunk = args.chunk or [256, 1024]
    if args.method:
        print(json.dumps(measure(args)))
        return
    print(f"torch {torch.__version__}, {platform.machine()}, {args.threads} threads, {args.dtype}\n")
    print("| V | D | rows | method | seconds | peak memory, MiB | loss |\n|--:|--:|--:|---|--:|--:|--:|")
    for vocab, width, rows in ((args.vocab, args.width, args.rows),) if args.vocab else CASES:
        for method in methods(args.chunk):
            shape = ["--vocab", vocab, "--width", width, "--rows", rows, "--threads", args.threads, "--repeat", args.repeat]
            chunks = [part for chunk in args.chunk for part in ("--chunk", chunk)]
            command = [sys.executable, __file__, "--method", method, "--dtype", args.dtype, *map(str, shape + chunks)]
            run = subprocess.run(command, capture_output=True, text=True)
            if run.returncode:
                print(f"| {vocab} | {width} | {rows} | {method} | failed: {run.stderr.strip().splitlines()[-1]} | | |")
                continue
            got = json.loads(run.stdout)
            print(
                f"| {vocab} | {width} | {rows} | {method} | {got['seconds']:.3f} | {got['peak'] / 2**20:.0f} | {got['loss']:.5f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
